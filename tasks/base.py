"""The interface of a task, which measures a model on a data set."""

from abc import ABC, abstractmethod
from typing import Literal

from torch import nn

from nla.machine.cache import Cache
from nla.machine.errors import UserError
from nla.models.base import Inventory, Model
from tasks.data.base import Data

Figures = dict[str, float]


class Task(ABC):
    """A measurement of a model on a data set."""

    name: str
    data: Data
    reads: Literal["text", "images"]

    def check(self, inventory: Inventory) -> None:
        """Raise UserError, with one sentence, if this task cannot measure such a model."""
        if inventory.reads != self.reads:
            fitting = "task=imagenet" if inventory.reads == "images" else "task=language_modelling or task=commonsense"
            raise UserError(
                f"task={self.name} is for models that read {self.reads}, this one reads {inventory.reads}; use {fitting}"
            )

    @abstractmethod
    def evaluate(self, model: Model, cache: Cache, state: str, label: str) -> dict[str, Figures]:
        """Measure the model: {name of data: {metric: figure}}. Tables show the first metric.

        Args:
            cache: stores partial results, which are not measured again.
            state: identifies the weights, code and type of the model, as a part of the cache's keys.
            label: shown before the progress bar.
        """


def resident_bytes(module: nn.Module) -> int:
    """Number of bytes of the model's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
