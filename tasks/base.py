"""The interface of a task, which measures a model on a data set, and the standard errors of what it measures.

A standard error says how far a figure may be from that of infinitely much data of the same kind. Windows of one text, like
questions of one kind, resemble each other, so it is a lower bound of the uncertainty for other texts. Two models on the same
data err together: the difference between their figures is known better than each figure alone.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import closing
from typing import Any, Literal

import torch
from torch import nn
from tqdm import tqdm

from nla.machine.cache import Cache
from nla.machine.errors import UserError
from nla.machine.threads import ordered_map
from nla.models.base import Inventory, Model
from tasks.data import SETS
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


def require_same_kind(data: Data, inventory: Inventory) -> None:
    """Raise UserError if a task of any data got text for a model of images, or the other way round."""
    if inventory.reads != data.kind:
        raise UserError(
            f"data={data.name} holds {data.kind}, the model reads {inventory.reads}; choose data={SETS[inventory.reads]}"
        )


def scored_in_parts(
    score: Callable[[int], dict[str, Any]],
    count: int,
    cache: Cache,
    place: tuple[str, str],
    device: torch.device,
    shown: tuple[str, str],
    whole: Callable[[int, dict[str, Any]], bool] = lambda number, result: True,
) -> list[dict[str, Any]]:
    """The results of score(0), ..., score(count - 1). Each is stored as soon as it is there, and not computed again.

    Args:
        place: kind and key of the results in the cache.
        shown: text before the progress bar, and what a part is.
        whole: whether a stored result is of the whole part with this number.
    """
    label, unit = shown
    with cache.lock(*place):
        journal = cache.journal(*place)
        results = journal.read()
        missing = [i for i in range(count) if i not in results or not whole(i, results[i])]
        with closing(ordered_map(score, missing, device)) as scored:
            pairs, done = zip(missing, scored, strict=True), count - len(missing)
            for i, result in tqdm(pairs, label, count, initial=done, unit=unit, dynamic_ncols=True):
                journal.append(i, result)
                results[i] = result
    return [results[i] for i in range(count)]


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
