"""The result of compressing one matrix: its term, errors, size and cost."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from nla.matrix.objective import Norms, Objective
from nla.matrix.triplets import triplet_size
from nla.solvers.squared_error import squared_error_alone
from nla.terms.base import Term, shares
from nla.terms.kernel_term import KernelTerm


@dataclass(frozen=True)
class Errors:
    """Relative squared errors in one norm.

    Attributes:
        own: of the term.
        equal: of the best matrix of a given rank, for comparison.
        floor: of the best matrix of the largest rank that the term can have; 0 if its rank is not bounded.
    """

    own: float
    equal: float
    floor: float


@dataclass(frozen=True)
class Fit:
    """The fit of one matrix W. Errors are relative squared errors, ||W' - W||^2 / ||W||^2.

    Attributes:
        term: W'.
        n_params, bits: numbers and bits stored. A tensor shared by several matrices counts for the first of them.
        status: how the fit ended, as codes (`nla.solvers.base` explains them).
        losses: (step, error) during the fit, in the norm that the method minimises.
        relative_error: error of the term as stored.
        svd_error: error of truncated SVD with the bits that the matrix may take, in numbers of the model's type.
        floor: smallest error of any matrix of the term's largest rank (Eckart-Young); 0 if its rank is not bounded.
        optimum: smallest error that the kernel can reach at this size in the method's norm; None if unknown.
        weighted_error: ||(W' - W) X^T||^2 / ||W X^T||^2 over the calibration tokens X; None without a Gram matrix. If errors of
            earlier layers are corrected, the target T of `Norms.outputs` takes the place of W.
        svd_llm_error: weighted error of SVD-LLM with the same bits, the smallest of its rank.
        weighted_floor: floor of the weighted error.
        steps: of gradient descent, or pairs of a grid and linear factors after the first. Steps of a start are not counted.
        flops: floating-point operations of the start and all steps, counted from shapes.
        seconds: wall time on one processor thread (or the GPU), with that of measuring these errors.
        peak_bytes: peak memory in bytes, see PeakMemory.
    """

    term: Term
    n_params: int
    bits: int
    status: str
    losses: list[tuple[int, float]]
    relative_error: float
    svd_error: float
    floor: float
    optimum: float | None
    weighted_error: float | None
    svd_llm_error: float | None
    weighted_floor: float | None
    steps: int
    flops: int
    seconds: float
    peak_bytes: int


def errors(objective: Objective, term: Term, equal: int) -> Errors:
    """The errors of a term in the objective's norm, and those of the best matrix of rank `equal`."""
    error = float(squared_error_of(term, objective)) / objective.energy if objective.energy else 0.0
    spectrum, bound = objective.spectrum, term.rank_bound()
    return Errors(error, spectrum.tail(equal), 0.0 if bound is None else spectrum.tail(bound))


def squared_error_of(term: Term, objective: Objective) -> torch.Tensor:
    """||(W' - W) S||^2 in fp32. W' is not built as a whole if all parts of the term are KernelTerms."""
    kernel_terms = [leaf for leaf in term.leaves() if isinstance(leaf, KernelTerm)]
    if len(kernel_terms) < len(list(term.leaves())):
        return objective.squared(term.dense() - objective.weight)[0]
    kernels, triplets = [t.kernel for t in kernel_terms], [t.triplets for t in kernel_terms]
    return squared_error_alone(kernels, triplets, objective)


def equal_rank(out_features: int, in_features: int, bits: int, dtype: torch.dtype) -> int:
    """The rank of a truncated SVD (two factors and the singular values) that takes as many bits in this type."""
    return bits // (8 * dtype.itemsize) // triplet_size(out_features, in_features, 1)


@torch.no_grad()
def measured(norms: Norms, term: Term, scale: float, equal: int) -> dict[str, float | None]:
    """The error fields of a Fit, by name, for a term that approximates `scale` times the weight of the norms.

    Args:
        equal: rank of the SVD with which the term is compared.
    """
    unit = term.as_stored(torch.float32).scaled(1 / scale)
    plain = errors(norms.plain, unit, equal)
    found: dict[str, float | None] = {"relative_error": plain.own, "svd_error": plain.equal, "floor": plain.floor}
    weighted = None if norms.statistics.gram is None else errors(norms.outputs, unit, equal)
    names = ("weighted_error", "svd_llm_error", "weighted_floor")
    if weighted is None:
        return found | dict.fromkeys(names)
    return found | dict(zip(names, (weighted.own, weighted.equal, weighted.floor), strict=True))


def counted_once(fits: Sequence[Fit]) -> list[Fit]:
    """The fits of a group, with each shared tensor counted only for the first matrix that uses it."""
    counts = shares([fit.term for fit in fits])
    return [replace(fit, n_params=numbers, bits=bits) for fit, (numbers, bits) in zip(fits, counts, strict=True)]
