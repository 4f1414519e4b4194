"""The history of a retraining: a row of figures for every step, which is written and shown at once."""

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from nla.budget.adaptive import Tightening
from nla.budget.importance import IMPORTANCE_QUANTILES
from nla.matrix.triplets import Triplets
from nla.retrain.constraints import Constraints
from nla.terms.kernel_term import TENSORS
from nla.training.loop import Recipe
from nla.training.observer import Observer

Row = dict[str, Any]


class History(Observer):
    """Records a row of figures after every step, tightens the budget, and keeps the triplets on their constraints' surfaces.

    A row has: step (number of steps done), loss, lr, norm (of the gradient), budget and kept (parameters), seconds. A step
    that chooses the kept triplets again adds importance (IMPORTANCE_QUANTILES of their scores) and matrices ({matrix: kept
    parameters}). A checkpoint adds watched (nats) and, for text, watched_perplexity. GPUs add vram_bytes: the peak memory
    of the first process, on all of its GPUs, since this process began.

    Args:
        constraints: applied to the gradients and to every step.
        matrices: {name of a term: name of its matrix}, in the order of the tightening's triplets.
        tightening: masks the least important triplets; None to keep all triplets.
        budget, kept: numbers of parameters, for the rows, if all triplets are kept.
        beside: how many of them no triplet has, such as scales.
        watch: measures the loss on samples that are not trained on, as columns of a row; None to measure nothing.
        recipe: determines the steps at which `watch` is called.
        show: called with each new row.
    """

    def __init__(
        self,
        constraints: Constraints,
        matrices: dict[str, str],
        tightening: Tightening | None,
        budget: int,
        kept: int,
        beside: int,
        watch: Callable[[], Row] | None,
        recipe: Recipe,
        show: Callable[[Row], None],
    ) -> None:
        self.constraints, self.matrices, self.tightening = constraints, matrices, tightening
        self.budget, self.kept, self.beside = budget, kept, beside
        self.watch, self.recipe, self.show = watch, recipe, show
        self.rows: list[Row] = []
        self.since = time.perf_counter()
        self.ranking: Tensor | None = None

    def begin(self) -> None:
        if self.watch and not self.recipe.begin:  # a later stage begins where the one before it was measured
            self.add({"step": 0} | self.watch())
        self.since = time.perf_counter()

    def after_gradient(self, done: int, gradients: dict[str, Tensor]) -> None:
        if self.tightening and self.tightening.gradient == "loss":
            self.score(self.tightening, done, gradients)
        self.constraints.project(gradients)
        if self.tightening and self.tightening.gradient == "constrained":
            self.score(self.tightening, done, gradients)

    def score(self, tightening: Tightening, done: int, gradients: dict[str, Tensor]) -> None:
        """Update the importance of this process's triplets from the gradients as they are now."""
        names = list(self.matrices)
        parts = [Triplets(*(gradients[f"{names[i]}.{part}"] for part in TENSORS)) for i in tightening.own]
        tightening.after_gradient(done, parts)

    def before_publishing(self, done: int) -> None:
        if self.tightening:
            self.ranking = self.tightening.after_step(done)
        self.constraints.retract()

    def after_step(self, done: int, figures: dict[str, float]) -> None:
        row: Row = {"step": done, **figures, "budget": self.budget, "kept": self.kept}
        if self.tightening:
            kept = self.tightening.kept()
            row |= {"budget": self.beside + self.tightening.budget(done), "kept": self.beside + sum(kept)}
            if self.ranking is not None:
                row["importance"] = torch.quantile(self.ranking.float(), torch.tensor(IMPORTANCE_QUANTILES)).tolist()
                row["matrices"] = by_matrix(self.matrices.values(), kept)
        if vram := sum(map(torch.cuda.max_memory_allocated, range(torch.cuda.device_count()))):
            row["vram_bytes"] = vram
        row["seconds"] = time.perf_counter() - self.since
        if self.watch and (self.recipe.checkpoints(done) or done == self.recipe.end):
            row |= self.watch()
        self.since = time.perf_counter()
        self.add(row)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        self.show(row)

    def tensors(self) -> dict[str, Tensor]:
        return self.tightening.tensors() if self.tightening else {}

    def notes(self) -> list[Row]:
        return self.rows

    def restore(self, tensors: dict[str, Tensor], notes: list[Row]) -> None:
        if self.tightening:
            self.tightening.restore(tensors)
        for row in notes:
            self.add(row)
        self.since = time.perf_counter()


def by_matrix(matrices: Iterable[str], kept: Iterable[int]) -> dict[str, int]:
    """{matrix: kept parameters}, summed over its terms. `matrices` and `kept` give the matrix and the count of each term."""
    total: dict[str, int] = {}
    for matrix, count in zip(matrices, kept, strict=True):
        total[matrix] = total.get(matrix, 0) + count
    return total
