"""Fits triplets whose A and B are rounded to a codebook, by gradient descent that knows the rounding."""

import math
from contextlib import ExitStack

import torch
from torch import Tensor

from nla.machine.errors import NonFiniteError
from nla.matrix.objective import Objective
from nla.solvers.base import Solution, Status
from nla.solvers.coordinates import improved
from nla.solvers.gradient import GradientFit
from nla.solvers.squared_error import of_product
from nla.terms.rounded import RoundedTerm


def descend_rounded(solver: GradientFit, rounds: int, term: RoundedTerm, objective: Objective, measured: ExitStack) -> Solution:
    """The best iterate of gradient descent, and then of coordinate descent. All errors are those of the rounded triplets.

    Gradient descent computes the matrix from rounded A and B, and changes the numbers before rounding ("straight-through").

    Args:
        solver: optimiser, steps, learning rate and its schedule, types of the products. There is no early end.
        rounds: of coordinate descent, see `nla.solvers.coordinates`.
        term: the start; its parameters are changed.
        measured: as in `GradientFit.descend`.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
    """
    numbers = list(term.parameters())
    sizes = [max(float(p.detach().square().mean().sqrt()), 1e-12) for p in numbers]
    optimiser = solver.optimiser([{"params": [p], "lr": solver.lr * size} for p, size in zip(numbers, sizes, strict=True)])
    best: list[Tensor] = []
    best_error, losses = math.inf, list[tuple[int, float]]()
    for step in range(solver.steps + 1):
        if step == 2:  # the optimiser's state exists now, and later steps need no more memory
            measured.close()
        with torch.enable_grad():
            left, right = term.factors()
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
                p.grad = g.div_(objective.energy)
            optimiser.step()
    with torch.no_grad():
        for p, kept in zip(numbers, best, strict=True):
            p.copy_(kept)
    found, errors = improved(term, objective, rounds, torch.Generator().manual_seed(0))
    losses += [(solver.steps + i, error) for i, error in enumerate(errors, 1)]
    return Solution(found, losses, solver.steps, Status.ROUNDED, None)
