"""The contract of a task, and of the data that tasks and calibration read."""

from abc import ABC, abstractmethod
from typing import Literal

from torch import nn

from nla.cache import Cache
from nla.errors import UserError
from nla.models.base import Inventory, Model, Sample

Figures = dict[str, float]


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


class Task(ABC):
    """Measures a model on data."""

    name: str
    data: Data
    reads: Literal["text", "images"]

    def check(self, inventory: Inventory) -> None:
        """Raise UserError, in one sentence, if such a model cannot be measured by this task."""
        if inventory.reads != self.reads:
            fitting = "task=imagenet" if inventory.reads == "images" else "task=language_modelling or task=commonsense"
            raise UserError(
                f"task={self.name} is for models that read {self.reads}, this one reads {inventory.reads}; use {fitting}"
            )

    @abstractmethod
    def evaluate(self, model: Model, cache: Cache, state: str, label: str) -> dict[str, Figures]:
        """{name of data: {metric: figure}}; the first metric is the one that tables show.

        `state` identifies weights, code and type of the model: what was measured in a state is not measured again. `label`
        stands before the progress bar.
        """


def resident_bytes(module: nn.Module) -> int:
    """Bytes of the model's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
