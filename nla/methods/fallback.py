"""Linear factors in the place of a fit that is worse than they are."""

import torch

from nla.kernels.linear import Linear
from nla.machine.errors import require_choice
from nla.matrix.objective import Objective
from nla.methods.fit import equal_rank, squared_error_of
from nla.solvers.base import Solution, Status
from nla.terms.base import Term
from nla.terms.kernel_term import KernelTerm


def require_fallback(fallback: str | None) -> None:
    """Raise UserError if this is no value of the setting `method.fallback`."""
    require_choice("method.fallback", fallback, [None, "linear"])


def no_worse(fallback: str | None, solution: Solution, planned: Term, objective: Objective) -> Solution:
    """The solution. With `linear`: where their error is smaller, the best linear factors with as many bits as planned."""
    if fallback is None:
        return solution
    dtype = next(planned.parameters()).dtype
    rank = equal_rank(planned.out_features, planned.in_features, planned.bits(), dtype)
    with torch.no_grad():
        error = float(squared_error_of(solution.term, objective)) / objective.energy
    if not objective.spectrum.tail(rank) < error:
        return solution
    triplets, optimum = Linear().warm_start(objective, rank, 1, torch.Generator())
    last = max((step for step, _ in solution.losses), default=0)
    losses = [*solution.losses, (last, objective.spectrum.tail(rank))]
    return Solution(KernelTerm(Linear(), triplets), losses, solution.steps, Status.LINEAR, optimum)
