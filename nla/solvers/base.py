"""What a solver returns."""

from dataclasses import dataclass
from enum import Enum

from nla.matrix.triplets import Triplets


class Status(str, Enum):
    """How a fit ended, as a sentence."""

    OPTIMAL = "at the global optimum of this kernel at this size, known in closed form"
    CONVERGED = "converged: the error fell by less than the tolerance within the patience"
    STEP_LIMIT = "step limit reached while the error was still falling; solver.steps=... goes on"
    ZERO = "the matrix is zero and needs no triplets"


@dataclass(frozen=True)
class Solution:
    """Triplets and how they were found; `losses` are (step, relative squared error in the objective's norm)."""

    triplets: Triplets
    losses: list[tuple[int, float]]
    steps: int
    status: Status
    optimum: float | None
