"""Gradient descent on all numbers of a term whose matrix is the product of two thin factors."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nla.matrix.objective import Objective
from nla.solvers.base import Solution, Start
from nla.solvers.gradient import GradientFit
from nla.solvers.squared_error import of_product
from nla.terms.base import Sum, Term, side_by_side
from nla.terms.kernel_term import KernelTerm


def descend_factored(solver: GradientFit, start: Start, objective: Objective, damping: float | None = None) -> Solution:
    """Minimise ||(W' - W) S||^2 / ||W S||^2 over all numbers of the start's term W', in as many steps as the solver has.

    Args:
        start: its numbers are changed.
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
    descent = solver.descend(numbers, evaluate, lambda step, smallest, best: None, slower)
    return Solution(start.term, descent.losses, descent.steps, descent.status, start.optimum)


def joined(term: Term, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The factors of a term in a type. Those of a sum are rounded before they are copied side by side."""
    known = [summand.factors() for summand in (term.summands if isinstance(term, Sum) else [term])]
    found = side_by_side([factors and (factors[0].to(dtype), factors[1].to(dtype)) for factors in known])
    assert found is not None, f"{term.describe()} has no thin factors"
    return found
