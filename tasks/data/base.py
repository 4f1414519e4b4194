"""The interface of a data set, which tasks, calibration and training read."""

from abc import ABC, abstractmethod
from collections.abc import Collection
from copy import copy
from functools import cached_property
from typing import Any, Literal, Self

from nla.machine.cache import Cache
from nla.machine.errors import UserError
from nla.models.base import Model, Sample
from tasks.data import LEARNT


class Data(ABC):
    """A named set of documents, images or questions, with the split that is read: `test` (by tasks) or `train`."""

    name: str
    kind: Literal["text", "images", "questions"]
    split: str = "test"
    splits: Collection[str] = ("test", "train")

    @property
    def group(self) -> str:
        """The setting that chose the data set, for error messages."""
        return "data" if self.split == "test" else "calibration"

    @abstractmethod
    def check(self) -> None:
        """Raise UserError, with one sentence, if the contents cannot be loaded."""

    def identity(self, cache: Cache) -> str:
        """Digest of the contents for a run's signature; empty if the configuration determines the contents."""
        return ""

    def training(self) -> Self:
        """The data set with the split `train`, which calibration, retraining and pretraining read.

        Raises:
            UserError: the data set has no training split.
        """
        if "train" not in self.splits:
            others = LEARNT.get(self.kind, "text or images")
            raise UserError(f"calibration={self.name} has no training split; choose calibration={others}")
        other = copy(self)
        other.split = "train"
        for name in vars(self):
            if isinstance(getattr(type(self), name, None), cached_property):
                delattr(other, name)  # cached contents of the split `test`
        return other

    def samples(self, model: Model, count: int, length: int, seed: int) -> list[Sample]:
        """`count` random samples, of `length` tokens each if the data is text.

        Raises:
            UserError: data of this kind cannot be sampled.
        """
        raise UserError(f"{self.group}={self.name} cannot be sampled; choose text or images")

    def share_in(self, learnt: "Data") -> float:
        """The fraction of this data set that another one has, too, as far as this kind of data can tell."""
        return 0.0


def require_apart(measured: Data, learnt: Data) -> None:
    """Raise UserError if more than a hundredth of what is measured is also in what is learnt from."""
    share = measured.share_in(learnt)
    if share > 0.01:
        raise UserError(
            f"data={measured.name} and the training split of {learnt.name} have {share:.0%} of the measured data in common; "
            "measure on data that nothing is learnt from, and give the same held_out to both"
        )


def training_set(setting: str, node: dict[str, Any], kind: str) -> Any:
    """The training split of the data set of this kind in a node of conf/data.

    Args:
        setting: the setting that chose the node, for error messages.
        node: {kind: data set}, and settings that the data sets share.

    Raises:
        UserError: the node has no data set of this kind, or the data set has no training split.
    """
    sets = [value for value in node.values() if isinstance(value, Data)]
    chosen = next((data for data in sets if data.kind == kind), None)
    if chosen is None:
        names, kinds = (",".join(getattr(data, word) for data in sets) for word in ("name", "kind"))
        raise UserError(f"{setting}={names} holds {kinds}, the model reads {kind}; choose calibration={LEARNT[kind]}")
    return chosen.training()
