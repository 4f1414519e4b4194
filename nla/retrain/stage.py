"""Train a compressed model in stages, and keep the result."""

import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nla.blocks import chain
from nla.budget.adaptive import Adaptive, Tightening
from nla.cache import digest
from nla.config import Request
from nla.crew import Crew
from nla.layers import Term
from nla.models.base import Model, Sample
from nla.resume import Progress
from nla.retrain.distillation import Distillation
from nla.retrain.dropping import drop_from_training
from nla.retrain.history import History, Row, mean_loss
from nla.retrain.parts import chosen_parts, terms_of
from nla.retrain.surface import surface_of
from nla.trained import Trained, owned_by_module
from nla.training import Recipe, train
from nla.triplets import Triplets
from tasks.images import Images
from tasks.text import Text


def stage_keys(request: Request, key: str) -> list[str]:
    """Under which each stage of a retraining keeps its checkpoints; the last is of a leg without masked triplets."""
    return [digest([key, stage]) for stage in range(len(request.retraining.train) + 1)]


def retrain(request: Request, model: Model, key: str, show: Callable[[Row], None], crew: Crew) -> None:
    """Train what `retrain.train` names of a prepared model, stage after stage; the result is in the cache under `key`.

    Raises:
        NonFiniteError: names the step, the batch and the last good checkpoint.
    """
    settings = request.retraining
    blocks = recomputed_blocks(model, request.layers) if settings.recompute else nullcontext()
    with objective(request, model) as loss, blocks:
        course = Course(request, model, stage_keys(request, key), loss, show, crew)
        for number, parts in enumerate(settings.train):
            course.stage(number, parts)
    if crew.rank == 0:
        notes = {"trained": course.trained, "scored": course.scored, "rows": course.rows, "peak_bytes": course.peak_bytes}
        request.cache.store_tensors("retrained", key, course.tensors, notes)
    crew.wait()


class Course:
    """What the stages of a retraining share, and what they leave (see `Retrained`)."""

    def __init__(
        self,
        request: Request,
        model: Model,
        keys: list[str],
        loss: Callable[[Sample], Tensor],
        show: Callable[[Row], None],
        crew: Crew,
    ) -> None:
        self.request, self.model, self.keys, self.loss, self.show, self.crew = request, model, keys, loss, show, crew
        self.recipe, self.terms = request.retraining.recipe, terms_of(model.module)
        self.batch, self.watch = batches(request, model), watched(request, model) if crew.rank == 0 else None
        self.rows: list[Row] = []
        self.tensors: dict[str, Tensor] = {}
        self.trained = self.scored = self.peak_bytes = 0

    def stage(self, number: int, parts: list[str]) -> None:
        """Train these parts; where the budget tightens, in two legs: masked triplets are gone from the cool-down on."""
        trained = chosen_parts(self.model.module, parts)
        owned_by_module(trained, self.crew)
        self.trained = max(self.trained, sum(t.parameter.numel() for t in trained))
        masks = tightening(self.request, self.terms, trained, self.crew)
        recipe, label = replace(self.recipe, begin=number * self.recipe.steps), f"retrain {'+'.join(parts)}"
        if masks is None:
            progress = self.leg(trained, recipe, label, self.keys[number])
        else:
            self.scored = sum(t.parameter.numel() for t in trained if t.name.rpartition(".")[0] in self.terms)
            progress = self.leg(trained, recipe, label, self.keys[number], masks)
            if progress.done < recipe.end:
                trained = drop_from_training(self.terms, masks.masks, trained, progress)
                budget, masks = masks.final, None  # importance and the old numbers need not live on
                progress = self.leg(trained, recipe, label, self.keys[-1], None, progress, budget)
        self.peak_bytes = max(self.peak_bytes, progress.peak_bytes)
        self.tensors |= {t.name: t.parameter.detach() for t in trained}

    def leg(
        self,
        trained: list[Trained],
        recipe: Recipe,
        label: str,
        key: str,
        masks: Tightening | None = None,
        progress: Progress | None = None,
        budget: int | None = None,
    ) -> Progress:
        """Train to the end, or until masks do not change any more."""

        def shown(row: Row) -> None:
            self.rows.append(row)
            self.show(row)

        own = {t.name: t for t in trained if t.owner == self.crew.rank}
        surface, kept = surface_of(self.terms, own), sum(term.triplets.count() for term in self.terms.values())
        history = History(surface, list(self.terms), masks, budget or kept, kept, self.watch, recipe, shown)
        until, cache = masks.cool_down if masks else None, self.request.cache
        return train(trained, self.loss, self.batch, recipe, cache, key, label, history, self.crew, progress, until)


@contextmanager
def objective(request: Request, model: Model) -> Iterator[Callable[[Sample], Tensor]]:
    """The model's own loss, or with a dense model beside it that of `Distillation`."""
    if not request.retraining.distils:
        yield model.loss
        return
    dense = request.model.load(request.device, request.values["dtype"], request.cache)
    dense.module.requires_grad_(False)
    with closing(Distillation(model, dense, request.layers, request.retraining)) as loss:
        yield loss


def batches(request: Request, model: Model) -> Callable[[int], list[Sample]]:
    """step -> its micro-batches, a function of the seed and the step alone."""
    settings = request.retraining

    def batch(step: int) -> list[Sample]:
        seed = int(digest([request.values["seed"], step])[:15], 16)
        samples = request.training_data.samples(model, settings.batch, settings.length, seed)
        parts = [samples[i : i + settings.micro] for i in range(0, settings.batch, settings.micro)]
        return [Sample(torch.cat([s.inputs for s in part]), torch.cat([s.targets for s in part])) for part in parts]

    return batch


def watched(request: Request, model: Model) -> Callable[[], Row] | None:
    """The loss, of text the perplexity too, on a few samples of the first task's data that can be sampled."""
    data = next((task.data for task in request.tasks if isinstance(task.data, Text | Images)), None)
    count = request.retraining.watch
    if data is None or count == 0:
        return None
    samples = data.samples(model, count, request.retraining.length, request.values["seed"])

    def measure() -> Row:
        loss = mean_loss(model, samples)
        return {"watched": loss} | ({"watched_perplexity": math.exp(min(loss, 700))} if isinstance(data, Text) else {})

    return measure


def tightening(request: Request, terms: dict[str, Term], trained: list[Trained], crew: Crew) -> Tightening | None:
    """The masks of the model's terms, where the budget tightens."""
    budget = request.budget
    if not isinstance(budget, Adaptive):
        return None
    by_name = {t.name: t for t in trained}
    owners = [by_name[f"{name}.mu"].owner for name in terms]
    moved = [
        Triplets(*(by_name[f"{name}.{part}"].master for part in ("A", "B", "mu"))) if owner == crew.rank else term.triplets
        for (name, term), owner in zip(terms.items(), owners, strict=True)
    ]
    final = int((1 - request.values["ratio"]) * sum(entry.spec.n_params for entry in request.plan))
    return budget.tightening(moved, final, request.retraining.steps, crew, owners)


@contextmanager
def recomputed_blocks(model: Model, layers: list[str]) -> Iterator[None]:
    """Meanwhile every block keeps its inputs only; what is inside is computed again for the gradient (Chen et al., 2016)."""
    blocks = [block.module for block in chain(model, layers)]
    for block in blocks:
        forward = block.forward

        def again(*arguments: Any, forward: Callable = forward, **keywords: Any) -> Any:
            return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **keywords)

        block.forward = again
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
