"""The interface of a task, which measures a model on a data set, and the standard errors of what it measures.

A standard error says how far a figure may be from that of infinitely much data of the same kind. Windows of one text, like
questions of one kind, resemble each other, so it is a lower bound of the uncertainty for other texts. Two models on the same
data err together: the difference between their figures is known better than each figure alone.
"""

import math
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

        The standard error of a metric, where it is known, is named `<metric>_stderr` and is no metric itself.

        Args:
            cache: stores partial results, which are not measured again.
            state: identifies the weights, code and type of the model, as a part of the cache's keys.
            label: shown before the progress bar.
        """


STDERR = "_stderr"


def accuracy(metric: str, right: int, count: int) -> Figures:
    """The fraction p = right / count under the metric's name, and its standard error sqrt(p (1 - p) / (count - 1)).

    That is the sample deviation of right (1) and wrong (0) answers, divided by sqrt(count), as in lm-eval. One answer has none.
    """
    p = right / count
    return {metric: p} | ({metric + STDERR: math.sqrt(p * (1 - p) / (count - 1))} if count > 1 else {})


def resident_bytes(module: nn.Module) -> int:
    """Number of bytes of the model's parameters and buffers."""
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))
