"""Fits triplets whose A and B are rounded to a codebook."""

import torch

from nla.matrix.objective import Objective
from nla.solvers.base import Solution, Start, Status
from nla.solvers.coordinates import improved
from nla.solvers.factored import descend_factored
from nla.solvers.gradient import GradientFit
from nla.terms.rounded import RoundedTerm


def descend_rounded(solver: GradientFit, rounds: int, term: RoundedTerm, objective: Objective) -> Solution:
    """The best iterate of gradient descent, and then of coordinate descent. All errors are those of the rounded triplets.

    Gradient descent computes the matrix from rounded A and B, and changes the numbers before rounding ("straight-through").

    Args:
        rounds: of coordinate descent, see `nla.solvers.coordinates`.
        term: the start; its parameters are changed.

    Raises:
        NonFiniteError: the loss is NaN or infinite.
    """
    losses = descend_factored(solver, Start(term), objective).losses
    found, errors = improved(term, objective, rounds, torch.Generator().manual_seed(0))
    losses += [(solver.steps + i, error) for i, error in enumerate(errors, 1)]
    return Solution(found, losses, solver.steps, Status.ROUNDED, None)
