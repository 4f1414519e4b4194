"""What a fit begins with and what it ends with."""

import re
from dataclasses import dataclass
from enum import Enum

from nla.terms.base import Term


class Status(str, Enum):
    """How a fit ended, as a sentence; `code` names it in records."""

    OPTIMAL = "at the global optimum of this kernel at this size, known in closed form"
    CONVERGED = "converged: the error fell by less than the tolerance within the patience"
    STEP_LIMIT = "step limit reached while the error was still falling; solver.steps=... goes on"
    ZERO = "the matrix is zero and needs no triplets"

    @property
    def code(self) -> str:
        return self.name.lower()


REPAIRS = {
    "gram": "the Gram matrix of the inputs was not positive definite; a multiple of the identity was added",
    "fisher": "the Fisher information is zero; all inputs count alike",
}


def in_words(status: str) -> str:
    """The sentences of a status in a record: a code, and what was repaired, such as `optimal gram+1.1e-01`."""
    code, *repairs = status.split()
    names = [re.match("[a-z]*", repair)[0] for repair in repairs]  # type: ignore[index]
    return "; ".join([Status[code.upper()].value, *(REPAIRS[name] for name in names)])


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
