"""`python -m analysis.benchmarks.layer_latency [m=4096 n=11008] [kernel=phase] [dtype=bfloat16] [tokens=1] [table=FILE.csv]`.

Seconds of one layer by kernel, beside the dense layer: LLaMA-7B's shapes, bf16 and fp32, 1, 16 and 512 tokens. Triplets are
random, because the time does not depend on their values. `form` is `inference` (see `optimise_for_inference`) or `triplets`
(the layer that is trained). Each argument chooses one of the default values; m and n are given together. `ratio=`, `rounds=`
and `seconds=` are for all of them, and `table=` writes the table.

The layers take turns, and each has copies that are used one after another, so that no call finds its weights in the
processor's cache: in a model, other layers were computed since the last token.
"""

from collections.abc import Callable, Iterator
from copy import deepcopy
from itertools import cycle
from math import ceil
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn
from tqdm import tqdm

from analysis.benchmarks.command import given, main
from nla.compressed.inference import inference_layer
from nla.compressed.layer import CompressedLinear
from nla.kernels.base import Kernel
from nla.kernels.linear import Linear
from nla.kernels.phase import Phase
from nla.kernels.piecewise import Piecewise
from nla.machine.errors import UserError
from nla.machine.timing import Turns, in_turns, quartiles_of_ratio, quartiles_of_timings
from nla.models.base import DTYPES
from nla.terms.kernel_term import KernelTerm

KERNELS: dict[str, Kernel] = {"linear": Linear(), "piecewise": Piecewise(), "phase": Phase()}
SHAPES = ((4096, 4096), (4096, 11008), (11008, 4096))  # (out, in)
TOKENS = (1, 16, 512)
COLD_BYTES = 2**28  # of the copies of a layer together: several times the largest cache of usual processors
ROUNDS = 5
SECONDS = 0.2  # of measuring a layer in each round, at least


@torch.inference_mode()
def layer_latency(
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    kernels: tuple[str, ...] = tuple(KERNELS),
    dtypes: tuple[str, ...] = ("bfloat16", "float32"),
    tokens: tuple[int, ...] = TOKENS,
    ratio: float = 0.7,
    cold_bytes: int = COLD_BYTES,
    rounds: int = ROUNDS,
    seconds: float = SECONDS,
) -> pd.DataFrame:
    """A row per shape, type, number of tokens and layer.

    Columns: us (microseconds, median of all timings), q25 and q75 (their quartiles), to_dense (median over the rounds of the
    ratio of medians), bytes_to_dense and flops_to_dense (counted). The time of one token is bounded below by bytes, that of
    many tokens by operations.
    """
    cases = [(shape, dtype) for shape in shapes for dtype in dtypes]
    rows = []
    with tqdm(total=len(cases) * len(tokens), desc="layers", unit="case", dynamic_ncols=True) as bar:
        for (m, n), dtype in cases:
            layers = made_layers(m, n, ratio, kernels, DTYPES[dtype])
            copies = {name: copied(layer, cold_bytes) for name, layer in layers.items()}
            for count in tokens:
                x = torch.randn(count, n, dtype=DTYPES[dtype], generator=torch.Generator().manual_seed(0))
                found = in_turns({name: work(alike, x) for name, alike in copies.items()}, range(rounds), seconds)
                for name in layers:
                    kernel, _, form = name.partition(" ")
                    row = {"out": m, "in": n, "dtype": dtype, "tokens": count, "kernel": kernel, "form": form}
                    rows.append(row | figures(found[name], found["dense"]) | counted(layers[name], layers["dense"]))
                bar.update()
    return pd.DataFrame(rows)


def made_layers(m: int, n: int, ratio: float, kernels: tuple[str, ...], dtype: torch.dtype) -> dict[str, nn.Module]:
    """The dense layer, and each kernel's layer in both forms, with random numbers."""
    generator = torch.Generator().manual_seed(0)
    dense = nn.Linear(n, m, bias=False, dtype=dtype)
    layers: dict[str, nn.Module] = {"dense": dense}
    for name in kernels:
        kernel = KERNELS[name]
        h, r = kernel.size(m, n, int((1 - ratio) * m * n))
        term = KernelTerm(kernel, kernel.random_start(m, n, h, r, generator)).as_stored(dtype)
        layers[f"{name} inference"] = inference_layer(term, None)
        layers[f"{name} triplets"] = CompressedLinear(term, None)
    return layers


def copied(layer: nn.Module, cold_bytes: int) -> list[nn.Module]:
    """The layer and as many copies of it as have `cold_bytes` together."""
    return [layer, *(deepcopy(layer) for _ in range(ceil(cold_bytes / layer_bytes(layer)) - 1))]


def work(alike: list[nn.Module], x: Tensor) -> Callable[[], Tensor]:
    """A call computes the outputs of x by the next layer."""
    layers: Iterator[nn.Module] = cycle(alike)
    return lambda: next(layers)(x)


def figures(turns: Turns, dense: Turns) -> dict[str, float]:
    low, middle, high = (1e6 * seconds for seconds in quartiles_of_timings(turns))
    return {"us": middle, "q25": low, "q75": high, "to_dense": quartiles_of_ratio(turns, dense)[1]}


def counted(layer: nn.Module, dense: nn.Module) -> dict[str, float]:
    """Bytes that a layer reads and operations of a row, relative to the dense layer."""
    return {
        "bytes_to_dense": layer_bytes(layer) / layer_bytes(dense),
        "flops_to_dense": row_flops(layer) / row_flops(dense),
    }


def layer_bytes(layer: nn.Module) -> int:
    return sum(t.numel() * t.element_size() for t in (*layer.parameters(), *layer.buffers()))


def row_flops(layer: nn.Module) -> int:
    """Floating-point operations for one row."""
    if isinstance(layer, CompressedLinear):
        return layer.flops(layer.term, 1)
    return 2 * sum(t.numel() for t in (*layer.parameters(), *layer.buffers()))


def chosen(arguments: list[str]) -> dict[str, Any]:
    """The arguments of layer_latency() for a command line, and `table`.

    Raises:
        UserError: an argument is unknown, or has a wrong value.
    """
    values = given(arguments, "ratio", "m", "n", "tokens", "rounds", "seconds", "kernel", "dtype")
    for name, known in (("kernel", KERNELS), ("dtype", DTYPES)):
        if name in values and values[name] not in known:
            raise UserError(f"{name}={values[name]} is not allowed; choose {', '.join(known)}")
    asked = {name: values[name] for name in ("ratio", "rounds", "seconds", "table") if name in values}
    asked |= {f"{name}s": (values[name],) for name in ("kernel", "dtype") if name in values}
    asked |= {"tokens": (values["tokens"],)} if "tokens" in values else {}
    return asked | ({"shapes": ((values["m"], values["n"]),)} if "m" in values else {})


if __name__ == "__main__":
    main(layer_latency, chosen, {"us": 0, "q25": 0, "q75": 0, "to_dense": 2, "bytes_to_dense": 2, "flops_to_dense": 2})
