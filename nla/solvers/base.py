"""What a fit begins with and what it ends with."""

from dataclasses import dataclass
from enum import Enum

from nla.terms.base import Term


class Status(str, Enum):
    """How a fit ended, as a sentence."""

    OPTIMAL = "at the global optimum of this kernel at this size, known in closed form"
    CONVERGED = "converged: the error fell by less than the tolerance within the patience"
    STEP_LIMIT = "step limit reached while the error was still falling; solver.steps=... goes on"
    ZERO = "the matrix is zero and needs no triplets"


@dataclass(frozen=True)
class Start:
    """Where a fit begins. `optimum` is the smallest relative squared error such a term can have, where theory knows it."""

    term: Term
    optimum: float | None = None


@dataclass(frozen=True)
class Solution:
    """A term and how it was found; `losses` are (step, relative squared error in the objective's norm)."""

    term: Term
    losses: list[tuple[int, float]]
    steps: int
    status: Status
    optimum: float | None
