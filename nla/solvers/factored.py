"""Gradient descent on all numbers of a term whose matrix is the product of two thin factors."""

import math
from contextlib import ExitStack

import torch
from torch import Tensor

from nla.kernels.factored import FactoredKernel
from nla.machine.errors import NonFiniteError
from nla.matrix.objective import Objective
from nla.solvers.base import Solution, Start, Status
from nla.solvers.gradient import GradientFit
from nla.solvers.squared_error import of_product
from nla.terms.base import Sum, Term
from nla.terms.kernel_term import KernelTerm
from nla.terms.rounded import RoundedTerm
from nla.terms.scaled import Scaled


def descend_factored(solver: GradientFit, start: Start, objective: Objective, measured: ExitStack) -> Solution:
    """The best iterate of a descent that changes all numbers of the start's term. It is never worse than the start.

    Args:
        solver: optimiser, steps, learning rate and its schedule, types of the products. There is no early end.
        start: its numbers are changed.
        measured: as in `GradientFit.descend`.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
    """
    numbers = list(start.term.parameters())
    for p in numbers:  # a fused optimiser needs numbers and gradients with the same memory layout, and does not check it
        p.data = p.data.contiguous()
    sizes = [max(float(p.detach().square().mean().sqrt()), 1e-12) for p in numbers]
    optimiser = solver.optimiser([{"params": [p], "lr": solver.lr * size} for p, size in zip(numbers, sizes, strict=True)])
    best: list[Tensor] = []
    best_error, losses = math.inf, list[tuple[int, float]]()
    for step in range(solver.steps + 1):
        if step == 2:  # the optimiser's state exists now, and later steps need no more memory
            measured.close()
        with torch.enable_grad():
            left, right = factors(start.term)
        loss, d_left, d_right = of_product(left.detach(), right.detach(), objective, solver.products)
        error = float(loss) / objective.energy
        if not math.isfinite(error):
            raise NonFiniteError(f"the loss is {error} at step {step}; try solver.lr={solver.lr / 3:.2g}")
        if error < best_error:
            best, best_error = [p.detach().clone() for p in numbers], error
        if step % solver.interval == 0 or step == solver.steps:
            losses.append((step, error))
        if step < solver.steps:
            gradients = torch.autograd.grad((left, right), numbers, (d_left, d_right))
            for group, p, g, size in zip(optimiser.param_groups, numbers, gradients, sizes, strict=True):
                group["lr"] = solver.lr * size * solver.rate(step)
                p.grad = g.div(objective.energy).contiguous()
            optimiser.step()
    with torch.no_grad():
        for p, kept in zip(numbers, best, strict=True):
            p.copy_(kept)
    return Solution(start.term, losses, solver.steps, Status.STEP_LIMIT, start.optimum)


def factors(term: Term) -> tuple[Tensor, Tensor]:
    """L (out, k) and R (in, k) with dense() = L R^T, differentiable. All kernels of the term must have thin factors."""
    if isinstance(term, Sum):
        lefts, rights = zip(*(factors(summand) for summand in term.summands), strict=True)
        return torch.cat(lefts, 1), torch.cat(rights, 1)
    if isinstance(term, Scaled):
        left, right = factors(term.inner)
        return left * term.rows[:, None], right * term.columns[:, None]
    if isinstance(term, RoundedTerm):
        return term.factors()
    assert isinstance(term, KernelTerm) and isinstance(term.kernel, FactoredKernel)
    return term.kernel.factors(term.triplets)
