"""The start and the result of a fit, and the codes for how it ended."""

from dataclasses import dataclass
from enum import Enum

from nla.terms.base import Term


class Status(str, Enum):
    """How a fit ended. The value is a sentence for people; `code` is its short form in records."""

    OPTIMAL = "at the global optimum of this kernel at this size, known in closed form"
    CONVERGED = "converged: the error fell by less than the tolerance within the patience"
    STEP_LIMIT = "all steps were taken; solver.steps=... goes on"
    LINEAR = "linear factors of the same size have a smaller error than the fit, and were taken instead"
    ROUNDED = "rounded to few bits; the global optimum at this size is not known"
    DENSE = "kept dense: the budget gave the matrix all its bits"
    ZERO = "the matrix is zero and needs no triplets"

    @property
    def code(self) -> str:
        return self.name.lower()


REPAIRS = {  # code beside a status, and what was repaired
    "gram": "Gram matrices (diagonal raised)",  # not positive definite
    "fisher": "Fisher information (zero)",  # all inputs count alike then
}


@dataclass(frozen=True)
class Start:
    """The term that a fit starts from. `optimum` is the smallest relative squared error of any such term, None if unknown."""

    term: Term
    optimum: float | None = None


@dataclass(frozen=True)
class Solution:
    """The result of a fit. `losses` are (step, relative squared error in the objective's norm); `optimum` is as in Start."""

    term: Term
    losses: list[tuple[int, float]]
    steps: int
    status: Status
    optimum: float | None
