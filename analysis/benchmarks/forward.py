"""`python -m analysis.benchmarks.forward [ratio=0.7] [m=4096 n=4096] [tokens=512] [table=FILE.csv]`.

Peak memory and time of one layer with and without reconstruction, piecewise and phase, beside the dense layer. Triplets are
random, because neither depends on their values.
"""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from analysis.benchmarks.command import given, main
from nla.kernels.base import Kernel
from nla.kernels.phase import Phase
from nla.kernels.piecewise import Piecewise
from nla.machine.peak_memory import PeakMemory

KERNELS = (Piecewise(r=20, min_h=30), Phase())
REPEATS = 5
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def forward(m: int = 4096, n: int = 4096, ratio: float = 0.7, tokens: int = 512) -> pd.DataFrame:
    """A row per kernel and form of a layer of shape (m, n), see `compare_forms`."""
    return pd.concat([compare_forms(kernel, m, n, ratio, tokens) for kernel in KERNELS])


def compare_forms(
    kernel: Kernel, m: int, n: int, ratio: float, tokens: int, forms: Sequence[str] = ("apply", "reconstruct", "dense")
) -> pd.DataFrame:
    """Rows `apply` (no reconstruction), `reconstruct` (x @ dense().T) and `dense` (a plain linear layer), fp32.

    Bytes are peak memory without the inputs. `training_extra_bytes` is also without outputs and gradients, which every form
    needs. Seconds are medians. The forms take turns, so that a drift of the machine's speed affects all.
    """
    generator = torch.Generator().manual_seed(0)
    h, r = kernel.size(m, n, int((1 - ratio) * m * n))
    t = kernel.random_start(m, n, h, r, generator).map(lambda p: p.to(DEVICE).requires_grad_())
    weight = torch.randn(m, n, generator=generator).to(DEVICE).requires_grad_()
    x = torch.randn(tokens, n, generator=generator).to(DEVICE).requires_grad_()
    d_y = torch.ones(tokens, m, device=DEVICE)
    known: dict[str, tuple[Callable[[], Tensor], tuple[Tensor, ...]]] = {
        "apply": (lambda: kernel.apply(t, x), (x, t.A, t.B, t.mu)),
        "reconstruct": (lambda: x @ kernel.dense(t).T, (x, t.A, t.B, t.mu)),
        "dense": (lambda: x @ weight.T, (x, weight)),
    }
    chosen = {name: known[name] for name in forms}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in forms}
    for _ in range(REPEATS):
        for name, (forward, inputs) in chosen.items():
            seconds[name].append((timed(inference, forward), timed(training, forward, inputs, d_y)))
    rows = []
    for name, (forward, inputs) in chosen.items():
        results = 4 * (d_y.numel() + sum(p.numel() for p in inputs))
        inference_seconds, training_seconds = map(statistics.median, zip(*seconds[name], strict=True))
        training_bytes = peak(training, forward, inputs, d_y)
        rows.append(
            {
                "kernel": kernel.name,
                "form": name,
                "h": h,
                "r": r,
                "inference_bytes": peak(inference, forward),
                "training_bytes": training_bytes,
                "training_extra_bytes": training_bytes - results,
                "inference_seconds": inference_seconds,
                "training_seconds": training_seconds,
            }
        )
    return pd.DataFrame(rows)


def inference(forward: Callable[[], Tensor]) -> Tensor:
    with torch.no_grad():
        return forward()


def training(forward: Callable[[], Tensor], inputs: tuple[Tensor, ...], d_y: Tensor) -> tuple[Tensor, ...]:
    y = forward()
    return (y, *torch.autograd.grad(y, inputs, d_y))


def peak(work: Callable[..., Any], *arguments: Any) -> int:
    """Peak memory of `work` in bytes."""
    with PeakMemory(DEVICE) as memory:
        work(*arguments)
    return memory.peak_bytes


def timed(work: Callable[..., Any], *arguments: Any) -> float:
    begun = time.perf_counter()
    work(*arguments)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begun


def chosen(arguments: list[str]) -> dict[str, Any]:
    """The arguments of forward() for a command line, and `table`."""
    return given(arguments, "ratio", "m", "n", "tokens")


if __name__ == "__main__":
    main(forward, chosen, {"inference_seconds": 4, "training_seconds": 4}, DEVICE.type)
