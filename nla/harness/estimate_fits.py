"""What the fits of a run cost, counted from shapes, and how long that takes on this machine, from a short measurement."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nla.harness.request import PreparedRun
from nla.machine.threads import ordered_map
from nla.matrix.inputs import Statistics
from nla.matrix.objective import Norms
from nla.methods.base import MatrixMethod
from nla.solvers.gradient import PRODUCTS
from nla.solvers.squared_error import squared_error
from nla.terms.kernel_term import KernelTerm

LARGEST = 512  # side of the largest matrix that is measured
TOKENS = 512  # a forward's cost per token is counted at this many


@dataclass(frozen=True)
class Cost:
    """Operations (FLOP), forward per token and in the selected layers only; rates in FLOP/s of all workers together.

    A rate is 0 where nothing was measured.
    """

    dense_forward: float
    forward: float
    starts: int
    step: int
    steps: int
    start_rate: float
    step_rate: float


def estimate(prepared: PreparedRun) -> Cost:
    """Operations of fits and forward, and the rates at which a small matrix is started and stepped here."""
    method, terms = prepared.method, [matrix.term for matrix in prepared.plan.matrices]
    start_rate, step_rate = measured_rates(prepared, method) if isinstance(method, MatrixMethod) else (0.0, 0.0)
    return Cost(
        dense_forward=2 * prepared.plan.selected,
        forward=sum(term.forward_flops(TOKENS) for term in terms) / TOKENS,
        starts=sum(method.start_flops(term) for term in terms),
        step=sum(method.step_flops(term) for term in terms),
        steps=method.steps,
        start_rate=start_rate,
        step_rate=step_rate,
    )


def measured_rates(prepared: PreparedRun, method: MatrixMethod) -> tuple[float, float]:
    """FLOP/s of a start and of a step, one matrix per worker, for a random matrix like the first planned but not larger."""
    device, planned = torch.device(prepared.device), prepared.plan.matrices[0]
    m, n = min(planned.spec.out_features, LARGEST), min(planned.spec.in_features, LARGEST)
    bits = max(int(planned.bits / planned.spec.n_params * m * n), method.least_bits([(m, n)], torch.float32))
    term = method.plan_matrix(m, n, bits, torch.float32)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(m, n, generator=generator).to(device)
    statistics = Statistics(weight.T @ weight + n * torch.eye(n, device=device), weight.abs().mean(0), weight.square().sum(0))

    def start(_: int) -> None:
        method.start(method.objective(Norms(weight, statistics)), term, torch.Generator())

    start_flops = method.start_flops(term)
    start_rate = start_flops * rate(start, 2, device) if start_flops else 0.0
    if not method.steps:
        return start_rate, 0.0
    products = PRODUCTS[prepared.values["method"]["solver"]["products"]]
    objective = method.objective(Norms(weight, statistics))
    kernels = [leaf.kernel for leaf in term.leaves() if isinstance(leaf, KernelTerm)]
    triplets = [
        leaf.kernel.random_start(m, n, leaf.triplets.h, leaf.triplets.r, generator).map(lambda p: p.to(device))
        for leaf in term.leaves()
        if isinstance(leaf, KernelTerm)
    ]

    def step(_: int) -> None:
        squared_error(kernels, triplets, objective, products)

    return start_rate, method.step_flops(term) * rate(step, 8, device)


def rate(work: Callable[[int], None], times: int, device: torch.device) -> float:
    """How often per second the workers together do the work, after doing it once."""
    work(0)
    begun = time.perf_counter()
    for _ in ordered_map(work, range(times), device):
        pass
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return times / (time.perf_counter() - begun)
