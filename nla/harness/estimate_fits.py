"""The cost of a run's fits and refinement: operations, counted from shapes, and this machine's speed, measured briefly."""

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

from nla.compressed.layer import LAYERS
from nla.harness.request import PreparedRun
from nla.machine.device import PRODUCTS, products_in
from nla.machine.threads import ordered_map, workers
from nla.matrix.inputs import Statistics
from nla.matrix.objective import Norms
from nla.methods.base import MatrixMethod
from nla.models.base import DTYPES
from nla.solvers.squared_error import squared_error
from nla.terms.base import Term
from nla.terms.triplet_terms import triplet_terms

LARGEST = 512  # side of the largest matrix that is measured
TOKENS = 512  # tokens for which a forward pass is counted, to get its cost per token


@dataclass(frozen=True)
class Cost:
    """Operations in FLOP, and rates in FLOP/s of all workers together; a rate is 0 if it was not measured.

    Attributes:
        dense_forward, forward: of the selected layers per token, before and after compression.
        starts: of the starts of all fits.
        step: of one step of all fits.
        steps: largest number of steps.
        tokens: that refinement trains on, over all epochs; 0 without refinement, and of images, whose tokens are not counted.
        refining: of refinement in the selected layers, forward and backward.
    """

    dense_forward: float
    forward: float
    starts: int
    step: int
    steps: int
    start_rate: float
    step_rate: float
    tokens: int
    refining: float
    refining_rate: float


def estimate(prepared: PreparedRun) -> Cost:
    """Operations of fits and forward passes, and the speed of fitting a small matrix on this machine."""
    method, terms = prepared.method, [matrix.term for matrix in prepared.plan.matrices]
    start_rate, step_rate = measured_rates(prepared, method) if isinstance(method, MatrixMethod) else (0.0, 0.0)
    forward = sum(LAYERS[prepared.values["forward"]].flops(term, TOKENS) for term in terms) / TOKENS
    asked, tokens = prepared.values.get("statistics", {}), 0
    if prepared.refinement and prepared.inventory.reads == "text":
        tokens = asked["windows"] * asked["length"] * prepared.refinement.epochs
    return Cost(
        dense_forward=2 * prepared.plan.selected,
        forward=forward,
        starts=sum(method.start_flops(term) for term in terms),
        step=sum(method.step_flops(term) for term in terms),
        steps=method.steps,
        start_rate=start_rate,
        step_rate=step_rate,
        tokens=tokens,
        refining=3 * forward * tokens,
        refining_rate=refining_rate(prepared, method) if tokens and isinstance(method, MatrixMethod) else 0.0,
    )


def measured_rates(prepared: PreparedRun, method: MatrixMethod) -> tuple[float, float]:
    """FLOP/s of a start and of a step: one random matrix per worker, see `measured_term`."""
    device, term = torch.device(prepared.device), measured_term(prepared, method)
    m, n = term.out_features, term.in_features
    norms, generator = random_norms(m, n, device), torch.Generator().manual_seed(0)

    def start(_: int) -> None:
        unknown = Norms(norms.weight, norms.statistics)  # norms keep the spectra that a start computes
        method.start(method.objective(unknown), term, torch.Generator())

    start_flops = method.start_flops(term)
    start_rate = start_flops * rate(start, 1, device) if start_flops else 0.0
    if "solver" not in prepared.values["method"]:  # a further step is like the start
        return start_rate, start_rate
    products = PRODUCTS[prepared.values["method"]["solver"]["products"]]
    objective = method.objective(norms)
    leaves = triplet_terms(term)
    kernels = [leaf.kernel for leaf in leaves]
    triplets = [leaf.kernel.random_start(m, n, leaf.h, leaf.r, generator).map(lambda p: p.to(device)) for leaf in leaves]

    def step(_: int) -> None:
        squared_error(kernels, triplets, objective, products)

    return start_rate, method.step_flops(term) * rate(step, 4, device)


def refining_rate(prepared: PreparedRun, method: MatrixMethod) -> float:
    """FLOP/s of a step of refinement in one small layer, see `measured_term`: a forward and a backward pass of its tokens."""
    assert prepared.refinement
    device, planned, settings = torch.device(prepared.device), measured_term(prepared, method), prepared.refinement
    norms = random_norms(planned.out_features, planned.in_features, device)
    term = method.start(method.objective(norms), planned, torch.Generator()).term.trainable()
    layer = LAYERS[prepared.values["forward"]](term, None)
    x = torch.randn(settings.batch, planned.in_features, device=device, dtype=DTYPES[prepared.values["dtype"]]).requires_grad_()

    def step() -> None:
        with products_in(settings.products, device):
            output = layer(x)
        output.sum().backward()

    step()  # warm-up
    return 3 * layer.flops(term, settings.batch) / seconds_of(step, device)


def random_norms(out_features: int, in_features: int, device: torch.device) -> Norms:
    """A random matrix, and statistics of inputs that have no meaning."""
    weight = torch.randn(out_features, in_features, generator=torch.Generator().manual_seed(0)).to(device)
    gram = weight.T @ weight + in_features * torch.eye(in_features, device=device)
    return Norms(weight, Statistics(gram, weight.abs().mean(0), weight.square().sum(0)))


def measured_term(prepared: PreparedRun, method: MatrixMethod) -> Term:
    """The term that is measured, without values: it takes as many bits of each weight as the first planned one."""
    planned, dtype = prepared.plan.matrices[0], DTYPES[prepared.values["dtype"]]
    m, n = min(planned.spec.out_features, LARGEST), min(planned.spec.in_features, LARGEST)
    bits = max(int(planned.bits / planned.spec.n_params * m * n), method.least_bits([(m, n)], dtype))
    return method.plan_matrix(m, n, bits, dtype)


def rate(work: Callable[[int], None], each: int, device: torch.device) -> float:
    """How often all workers together do the work per second, after one warm-up call. Each worker does it `each` times."""
    times = each * workers(device)
    work(0)

    def together() -> None:
        for _ in ordered_map(work, range(times), device):
            pass

    return times / seconds_of(together, device)


def seconds_of(work: Callable[[], None], device: torch.device) -> float:
    """Seconds that the work takes, with all threads."""
    begun = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun
