"""What a request costs, counted from shapes, and how long that takes on this machine, from a short measurement."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nla.budget.base import PlanEntry
from nla.harness.request import PreparedRun
from nla.machine.threads import ordered_map
from nla.matrix.objective import Objective
from nla.solvers.gradient import PRODUCTS

LARGEST = 512  # side of the largest matrix that is measured
TOKENS = 512  # a forward's cost per token is counted at this many


@dataclass(frozen=True)
class Cost:
    """Operations (FLOP), forward per token and in the selected layers only; rates in FLOP/s of all workers together."""

    dense_forward: float
    forward: float
    starts: int
    step: int
    steps: int
    start_rate: float
    step_rate: float


def estimate(prepared: PreparedRun) -> Cost:
    """Operations of fits and forward, and the rates at which a small matrix is started and stepped here."""
    method, sizes = prepared.method, [(e.spec.out_features, e.spec.in_features, e.h, e.r) for e in prepared.plan]
    start_rate, step_rate = measured_rates(prepared, prepared.plan[0])
    return Cost(
        dense_forward=2 * sum(m * n for m, n, _, _ in sizes),
        forward=sum(method.kernel.forward_flops(*size, TOKENS) for size in sizes) / TOKENS,
        starts=sum(method.start_flops(*size) for size in sizes),
        step=sum(method.step_flops(*size) for size in sizes),
        steps=method.steps,
        start_rate=start_rate,
        step_rate=step_rate,
    )


def measured_rates(prepared: PreparedRun, entry: PlanEntry) -> tuple[float, float]:
    """FLOP/s of a warm start and of a step, one matrix per worker, for a random matrix like the planned one but not larger."""
    kernel, device = prepared.method.kernel, torch.device(prepared.device)
    m, n = min(entry.spec.out_features, LARGEST), min(entry.spec.in_features, LARGEST)
    h, r = kernel.size(m, n, int(entry.n_params / entry.spec.n_params * m * n))
    h = max(h, 1)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(m, n, generator=generator).to(device)
    products = PRODUCTS[prepared.values["method"].get("solver", {}).get("products", "float32")]
    objective = Objective(weight)
    t = kernel.random_start(m, n, h, r, generator).map(lambda p: p.to(device))

    def start(_: int) -> None:
        kernel.warm_start(Objective(weight), h, r, torch.Generator())

    def step(_: int) -> None:
        kernel.squared_error(t, objective, products)

    start_flops = kernel.warm_start_flops(m, n, h, r)
    return start_flops * rate(start, 2, device), kernel.fit_flops(m, n, h, r) * rate(step, 8, device)


def rate(work: Callable[[int], None], times: int, device: torch.device) -> float:
    """How often per second the workers together do the work, after doing it once."""
    work(0)
    begun = time.perf_counter()
    for _ in ordered_map(work, range(times), device):
        pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return times / (time.perf_counter() - begun)
