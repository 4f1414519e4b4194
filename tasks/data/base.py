"""The contract of a data set."""

from abc import ABC, abstractmethod
from typing import Literal

from nla.machine.cache import Cache
from nla.machine.errors import UserError
from nla.models.base import Model, Sample


class Data(ABC):
    """A named set of documents, images or questions."""

    name: str
    kind: Literal["text", "images", "questions"]

    @abstractmethod
    def check(self) -> None:
        """Raise UserError, in one sentence, if the contents cannot be had."""

    def identity(self, cache: Cache) -> str:
        """What the configuration does not say of the contents, for the signature of a run."""
        return ""

    def samples(self, model: Model, count: int, length: int, seed: int) -> list[Sample]:
        """`count` samples at random, of `length` tokens each where the data is text, for calibration and training."""
        raise UserError(f"calibration={self.name} cannot be sampled; use a text or images")
