"""Fits of the triplets of one kernel or a sum of several, which end early at a known optimum or when nothing is gained."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nla.kernels.base import Kernel
from nla.matrix.objective import Objective
from nla.matrix.triplets import Triplets
from nla.solvers.base import Solution, Start, Status
from nla.solvers.gradient import GradientFit
from nla.solvers.squared_error import squared_error, squared_error_alone
from nla.terms.base import Sum, Term
from nla.terms.kernel_term import KernelTerm

AT_OPTIMUM = 1e-4  # relative distance to a known optimum at which it counts as reached


def descend_triplets(solver: GradientFit, start: Start, objective: Objective) -> Solution:
    """Minimise ||(W' - W) S||^2 / ||W S||^2, where W' is the start's term, a KernelTerm or a Sum of them. See `descend`.

    Args:
        start: its numbers stay as they are.
    """
    terms = [term for term in start.term.leaves() if isinstance(term, KernelTerm)]
    kernels = [term.kernel for term in terms]
    moved = [term.triplets.map(lambda p: p.detach().clone().contiguous()) for term in terms]
    numbers = [p for t in moved for p in t.tensors]
    ending = Ending(solver, kernels, objective, start.optimum)

    def evaluate(gradients: bool) -> tuple[float, list[Tensor]]:
        if not gradients:
            return float(squared_error_alone(kernels, moved, objective, solver.products)) / objective.energy, []
        loss, found = squared_error(kernels, moved, objective, solver.products)
        return float(loss) / objective.energy, [p.div_(objective.energy) for t in found for p in t.tensors]

    descent = solver.descend(numbers, evaluate, ending, min(kernel.fitting_rate for kernel in kernels))
    return Solution(sum_of(kernels, moved), descent.losses, descent.steps, descent.status, start.optimum)


class Ending:
    """Called after each step, it says how the fit ended: at the known optimum, converged, or not yet (None)."""

    def __init__(self, solver: GradientFit, kernels: Sequence[Kernel], objective: Objective, optimum: float | None) -> None:
        self.solver, self.kernels, self.objective, self.optimum = solver, kernels, objective, optimum
        self.reference = math.inf  # the smallest error when the last `patience` steps began

    def __call__(self, step: int, smallest: float, best: Sequence[Tensor]) -> Status | None:
        if self.optimum is not None and self.error(step, smallest, best) <= self.optimum * (1 + AT_OPTIMUM) + 1e-9:
            return Status.OPTIMAL
        if step % self.solver.patience == 0 and step > self.solver.warmup:
            if smallest > self.reference * (1 - self.solver.tolerance):
                return Status.CONVERGED
            self.reference = smallest
        return None

    def error(self, step: int, smallest: float, best: Sequence[Tensor]) -> float:
        """The smallest error. That of bf16 products would hide the optimum: now and then fp32 decides."""
        if self.solver.products == torch.float32 or step % self.solver.interval:
            return smallest
        triplets = [Triplets(*best[i : i + 3]) for i in range(0, len(best), 3)]
        return float(squared_error_alone(self.kernels, triplets, self.objective)) / self.objective.energy


def sum_of(kernels: Sequence[Kernel], triplets: Sequence[Triplets]) -> Term:
    """The KernelTerm of one kernel and its triplets, or the Sum of several."""
    terms = [KernelTerm(kernel, t) for kernel, t in zip(kernels, triplets, strict=True)]
    return terms[0] if len(terms) == 1 else Sum(terms)
