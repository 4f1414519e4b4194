"""The contract of a task, and of the data that tasks and calibration read."""

from abc import ABC, abstractmethod
from typing import Literal

from torch import nn

from nla.machine.cache import Cache
from nla.machine.errors import UserError
from nla.models.base import Inventory, Model
from tasks.data.base import Data

Figures = dict[str, float]


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
