"""The interface of a budget, which decides how many bits each matrix may keep."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from nla.matrix.objective import Norms
from nla.methods.fit import Fit
from nla.models.select import LinearSpec


@dataclass(frozen=True)
class Target:
    """The size that the selected layers may have after compression.

    Attributes:
        bits: average bits per weight of the selected layers.
        width: bits per number of the model's type.
        asked: the setting that the target comes from, such as `ratio=0.7` or `bits=2.0`.
    """

    bits: float
    width: int
    asked: str

    @property
    def kept(self) -> float:
        """The kept fraction of the parameters, if parameters are stored in the model's type."""
        return self.bits / self.width


class ModelView(Protocol):
    """Measurements of the model that a budget may ask for. Slow ones are cached on disk."""

    def norms(self, name: str) -> Norms:
        """A matrix, its singular values, and the statistics of its inputs that the budget `needs`."""

    def size(self, name: str, bits: int) -> int:
        """The bits of the largest term of one matrix within `bits`; 0 if that is less than the smallest term."""

    def fits(self, name: str, sizes: Sequence[int]) -> list[Fit]:
        """The method's fits of one matrix in each of these sizes (bits), with their errors."""

    def losses(self, name: str, sizes: Sequence[int]) -> list[float]:
        """The model's mean loss (nats) on calibration samples, if only this matrix is compressed, for each of these sizes."""


class Budget(ABC):
    """Divides the bits of a target among the matrices.

    Attributes:
        needs: statistics of inputs that the shares depend on.
        samples: number of calibration samples for `ModelView.losses`.
        tightens: the shares are those at the start of retraining, which ends within the target.
    """

    needs: frozenset[str] = frozenset()
    samples = 0
    tightens = False

    @abstractmethod
    def allocate(self, specs: list[LinearSpec], target: Target) -> dict[str, int]:
        """{matrix: bits}, from shapes alone. The sum is at most the target's, unless the budget `tightens`."""

    def check_retraining(self, steps: int, train: list[list[str]]) -> None:  # noqa: B027 (most budgets go with any)
        """Raise UserError if the budget cannot be used with `steps` retraining steps and these stages (see `Retraining`)."""
