"""The contract of a data set."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from copy import copy
from functools import cached_property
from typing import Any, Literal, Self

from nla.machine.cache import Cache
from nla.machine.errors import UserError
from nla.models.base import Model, Sample
from tasks.data import SETS


class Data(ABC):
    """A named set of documents, images or questions, at one of its splits: `test`, which tasks measure on, or `train`."""

    name: str
    kind: Literal["text", "images", "questions"]
    split: str = "test"
    splits: Collection[str] = ("test", "train")

    @property
    def group(self) -> str:
        """The group of the command line that chose the set."""
        return "data" if self.split == "test" else "calibration"

    @abstractmethod
    def check(self) -> None:
        """Raise UserError, in one sentence, if the contents cannot be had."""

    def identity(self, cache: Cache) -> str:
        """What the configuration does not say of the contents, for the signature of a run."""
        return ""

    def training(self) -> Self:
        """The same set at its split `train`, which methods, retraining and pretraining learn from."""
        if "train" not in self.splits:
            raise UserError(f"calibration={self.name} has no training split; choose calibration={SETS[self.kind]}")
        other = copy(self)
        other.split = "train"
        for name in vars(self):
            if isinstance(getattr(type(self), name, None), cached_property):
                delattr(other, name)  # the contents of the split `test`
        return other

    def samples(self, model: Model, count: int, length: int, seed: int) -> list[Sample]:
        """`count` samples at random, of `length` tokens each where the data is text."""
        raise UserError(f"{self.group}={self.name} cannot be sampled; choose text or images")


def training_set(setting: str, node: dict[str, Any], kind: str) -> Any:
    """The training split of the set of this kind in a node of conf/data.

    Args:
        setting: what the user chose the node by.
        node: {kind: set}, and settings that the sets share.

    Raises:
        UserError: the node has no set of this kind, or the set no training split.
    """
    sets = [value for value in node.values() if isinstance(value, Data)]
    chosen = next((data for data in sets if data.kind == kind), None)
    if chosen is None:
        names, kinds = (",".join(getattr(data, word) for data in sets) for word in ("name", "kind"))
        raise UserError(f"{setting}={names} holds {kinds}, the model reads {kind}; choose calibration={SETS[kind]}")
    return chosen.training()
