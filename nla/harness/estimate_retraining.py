"""The cost of a retraining, counted on the model's architecture without weights."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from nla.budget.adaptive import Adaptive
from nla.budget.plan import PlannedMatrix
from nla.compressed.layer import LAYERS
from nla.harness.request import PreparedRun
from nla.matrix.triplets import triplet_size
from nla.models.base import DTYPES
from nla.terms.coded import CodedTerm
from nla.terms.triplet_terms import triplet_terms

FP32, MOMENTS = 4, 8  # bytes of a number, and of the two averages that AdamW (or importance) keeps for it


@dataclass(frozen=True)
class RetrainingCost:
    """Operations in FLOP, and bytes of one process without activations, if all processes have equal shares.

    Attributes:
        forward: operations of one sample through the compressed model, before retraining drops triplets.
        flops: operations of all samples: a forward pass, twice as much for the gradient, another forward pass if blocks are
            recomputed, and one of the dense model if it is a teacher. Dropped triplets do not count from the cool-down on.
        gradient_bytes: gradient of a micro-batch in the model's type, and the process's share of its sum in fp32.
    """

    samples: int
    tokens: int | None
    forward: float
    flops: float
    weights_bytes: int
    gradient_bytes: int
    optimiser_bytes: int
    importance_bytes: int


def retraining_cost(prepared: PreparedRun) -> RetrainingCost:
    """The cost of the request's retraining.

    Operations are an upper bound: they include gradients of frozen weights, which are not computed. Norms and biases are not
    counted.
    """
    settings, matrices = prepared.retraining, prepared.plan.matrices
    dense, rows = dense_forward(prepared)
    specs = [matrix.spec for matrix in matrices]
    selected = sum(2 * spec.n_params * rows[spec.name] for spec in specs)
    layer = LAYERS[prepared.values["forward"]]
    compressed = sum(layer.flops(matrix.term, rows[matrix.spec.name]) for matrix in matrices)
    linear_terms = sum(2 * (s.out_features + s.in_features) * settings.linear_term * rows[s.name] for s in specs)
    rest = dense - selected + linear_terms
    forward, mean = rest + compressed, rest + compressed * mean_kept(prepared)
    samples = settings.steps * settings.batch
    triplets = sum(moved(matrix, {"triplets"}, settings.linear_term) for matrix in matrices)
    kept = prepared.inventory.parameters - prepared.plan.selected + triplets
    stages = [sum(moved(matrix, set(parts), settings.linear_term) for matrix in matrices) for parts in settings.train]
    trained = kept if any("everything" in parts for parts in settings.train) else max(stages)
    width = DTYPES[prepared.values["dtype"]].itemsize
    held = kept + (prepared.inventory.parameters if settings.distils else 0)
    own = trained // settings.processes
    masters = 0 if width == FP32 else FP32 * own
    return RetrainingCost(
        samples=samples,
        tokens=samples * settings.length if prepared.inventory.reads == "text" else None,
        forward=forward,
        flops=samples * (mean * (4 if settings.recompute else 3) + (dense if settings.compares else 0)),
        weights_bytes=held * width + masters,
        gradient_bytes=width * trained + FP32 * own,
        optimiser_bytes=MOMENTS * own,
        importance_bytes=MOMENTS * triplets // settings.processes if prepared.budget.tightens else 0,
    )


def mean_kept(prepared: PreparedRun) -> float:
    """The fraction of the triplets that a step computes with, averaged over all steps."""
    if not isinstance(prepared.budget, Adaptive):
        return 1.0
    steps = prepared.retraining.steps
    before = prepared.budget.schedule.phases(steps)[1] / steps
    final = prepared.target.bits * prepared.plan.selected / sum(matrix.bits for matrix in prepared.plan.matrices)
    return before + (1 - before) * min(1.0, final)


def moved(matrix: PlannedMatrix, parts: set[str], linear_term: int) -> int:
    """Number of parameters of one matrix that retraining changes, given these parts of `retrain.train`."""
    m, n = matrix.spec.out_features, matrix.spec.in_features
    terms = triplet_terms(matrix.term)
    count = sum(term.h * term.r for term in terms)
    sizes = {"A": m * (linear_term + count), "B": n * (linear_term + count), "mu": linear_term + sum(t.h for t in terms)}
    if parts & {"triplets", "everything"}:
        codes = sum((m + n) * term.h * term.r for term in terms if isinstance(term, CodedTerm))  # trained unrounded
        return sum(p.numel() for p in matrix.term.parameters()) + codes + linear_term * triplet_size(m, n, 1)
    if "linear_term" in parts:
        return linear_term * triplet_size(m, n, 1)
    return sum(size for part, size in sizes.items() if part in parts)


def dense_forward(prepared: PreparedRun) -> tuple[float, dict[str, int]]:
    """Operations of one sample through the dense model, counted by torch, and the input rows of each selected layer."""
    module, _ = prepared.model.empty(prepared.model.configuration(prepared.cache))
    rows: dict[str, int] = {}

    def reads(name: str) -> None:
        def note(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows[name] = inputs[0].numel() // inputs[0].shape[-1]

        module.get_submodule(name).register_forward_pre_hook(note)

    for layer in prepared.plan.layers:
        reads(layer)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        module.eval()(meta_sample(prepared, module))
    return counter.get_total_flops(), rows


def meta_sample(prepared: PreparedRun, module: nn.Module) -> Tensor:
    """One sample on the meta device: token ids, or an image of the size that timm has for the model."""
    if prepared.inventory.reads == "text":
        return torch.zeros(1, prepared.retraining.length, dtype=torch.long, device="meta")
    from timm.data import resolve_model_data_config

    return torch.zeros(1, *resolve_model_data_config(module)["input_size"], device="meta")
