"""The contract of a budget: how many bits each matrix may keep."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

from nla.matrix.objective import Norms
from nla.methods.fit import Fit
from nla.models.select import LinearSpec


@dataclass(frozen=True)
class Target:
    """What a budget shares out.

    Attributes:
        bits: average per weight of the selected layers.
        width: bits of a number of the model's type.
        asked: the setting that it comes from, `ratio=0.7` or `bits=2.0`.
    """

    bits: float
    width: int
    asked: str

    @property
    def kept(self) -> float:
        """The kept fraction of the numbers, where numbers are stored in the model's type."""
        return self.bits / self.width


class ModelView(Protocol):
    """What a budget that looks at the model may ask for. Whatever takes long is kept on disk."""

    def norms(self, name: str) -> Norms:
        """A matrix, its spectra, and the statistics of its inputs that the budget `needs`."""

    def fit(self, name: str, bits: int) -> Fit | None:
        """The method's fit of one matrix in so many bits, with its errors; None where they buy nothing."""

    def loss(self, name: str, bits: int) -> float:
        """The model's mean loss on calibration samples with this matrix alone compressed to so many bits."""


class Budget(ABC):
    """Shares out the bits of a target.

    Attributes:
        needs: statistics of inputs that look() reads.
        looks: shares depend on more than shapes, and are known only after look().
        samples: calibration samples on which losses are measured.
        tightens: shares are what retraining begins with; it ends within the target.
    """

    needs: frozenset[str] = frozenset()
    looks = False
    samples = 0
    tightens = False

    @abstractmethod
    def allocate(self, specs: list[LinearSpec], target: Target) -> dict[str, int]:
        """Bits per matrix name, from shapes alone; together at most the target's."""

    def look(self, specs: list[LinearSpec], target: Target, view: ModelView) -> dict[str, int]:
        """The same, with the model at hand."""
        return self.allocate(specs, target)

    def check_retraining(self, steps: int, train: list[list[str]]) -> None:  # noqa: B027 (most budgets go with any)
        """Raise UserError if this budget does not go with a retraining of so many steps and these stages of parts."""
