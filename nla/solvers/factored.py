"""Gradient descent on all numbers of a term whose matrix is the product of two thin factors."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from nla.kernels.factored import FactoredKernel
from nla.matrix.objective import Objective
from nla.solvers.base import Solution, Start
from nla.solvers.gradient import GradientFit
from nla.solvers.squared_error import of_product
from nla.terms.base import Sum, Term
from nla.terms.kernel_term import KernelTerm
from nla.terms.rounded import RoundedTerm
from nla.terms.scaled import Scaled


def descend_factored(
    solver: GradientFit, start: Start, objective: Objective, measured: ExitStack, damping: float | None = None
) -> Solution:
    """Minimise ||(W' - W) S||^2 / ||W S||^2 over all numbers of the start's term W', in as many steps as the solver has.

    Args:
        start: its numbers are changed.
        measured: as in `GradientFit.descend`.
        damping: of `Objective.preconditioned`; None: plain gradients.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
    """
    energy = objective.energy or 1.0  # 0: what linear factors leave of a matrix of their rank
    back = None if damping is None else objective.preconditioned(damping, solver.products)
    numbers = list(start.term.parameters())
    for p in numbers:
        p.data = p.data.contiguous()

    def evaluate(gradients: bool) -> tuple[float, Sequence[Tensor]]:
        with torch.set_grad_enabled(gradients):
            left, right = joined(start.term, solver.products)
        loss, d_left, d_right = of_product(left.detach(), right.detach(), objective, solver.products, back)
        found = torch.autograd.grad((left, right), numbers, (d_left, d_right)) if gradients else ()
        return float(loss) / energy, [g.div(energy) for g in found]

    slower = min((part.kernel.fitting_rate for part in start.term.modules() if isinstance(part, KernelTerm)), default=1.0)
    descent = solver.descend(numbers, evaluate, lambda step, smallest, best: None, measured, slower)
    return Solution(start.term, descent.losses, descent.steps, descent.status, start.optimum)


def joined(term: Term, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors of a term, or of a sum of terms side by side, in a type. Numbers are rounded before they are copied."""
    summands = term.summands if isinstance(term, Sum) else [term]
    lefts, rights = zip(*([f.to(dtype) for f in factors(summand)] for summand in summands), strict=True)
    return torch.cat(lefts, 1), torch.cat(rights, 1)


def factors(term: Term) -> tuple[Tensor, Tensor]:
    """L (out, k) and R (in, k) with dense() = L R^T, differentiable. All kernels of the term must have thin factors."""
    if isinstance(term, Scaled):
        left, right = factors(term.inner)
        return left * term.rows[:, None], right * term.columns[:, None]
    if isinstance(term, RoundedTerm):
        return term.factors()
    assert isinstance(term, KernelTerm) and isinstance(term.kernel, FactoredKernel)
    return term.kernel.factors(term.triplets)
