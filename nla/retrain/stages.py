"""Trains a compressed model in stages and stores the result in the cache."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nla.budget.adaptive import Adaptive, Tightening
from nla.compressed.contents import kernel_terms, matrix_of, matrix_terms
from nla.machine.cache import Cache, digest
from nla.machine.device import products_in
from nla.machine.errors import UserError
from nla.machine.seeds import seed_of
from nla.matrix.triplets import Triplets
from nla.models.base import Model, Sample
from nla.retrain.constraints import Constraints
from nla.retrain.dropping import drop_from_training
from nla.retrain.history import History, Row
from nla.retrain.losses import Distillation
from nla.retrain.settings import Retraining
from nla.retrain.trainable import chosen_parts
from nla.statistics.blocks import chain
from nla.terms.base import shares
from nla.terms.kernel_term import TENSORS
from nla.training.checkpoints import Progress
from nla.training.loop import Recipe, train
from nla.training.mean_loss import mean_loss
from nla.training.parameters import TrainedParameter, owned_by_module
from nla.training.processes import OneProcess
from tasks.data.base import Data


def checkpoint_keys(key: str, stages: int) -> list[str]:
    """Cache keys of the checkpoints: one for each stage, and a last one for the steps after masked triplets are dropped."""
    return [digest([key, stage]) for stage in range(stages + 1)]


def train_in_stages(
    model: Model,
    layers: Sequence[str],
    settings: Retraining,
    load_dense: Callable[[], Model],
    watch: Callable[[], Row] | None,
    budget: Adaptive | None,
    final: int,
    seed: int,
    cache: Cache,
    key: str,
    show: Callable[[Row], None],
    processes: OneProcess,
) -> None:
    """Train the parts that `settings.train` names, in place and stage by stage. Stores the result in the cache under `key`.

    Args:
        model: a compressed model after `nla.retrain.trainable.prepare_terms`.
        layers: qualified names of the compressed layers.
        load_dense: loads the dense model, for losses that compare with it.
        watch: measures the loss on samples that are not trained on (see `watched_loss`).
        budget: masks triplets during training; None to keep all triplets.
        final: number of parameters that the budget ends with.
        seed: seed of the samples.
        show: called with each row of the history.

    Raises:
        NonFiniteError: a loss or gradient is not finite; it names the step, the batch and the last checkpoint.
    """
    recomputed = recomputed_blocks(model, layers) if settings.recompute else nullcontext()
    with loss_function(model, layers, settings, load_dense) as loss, recomputed:
        batch = batches(model, settings, seed)
        keys = checkpoint_keys(key, len(settings.train))
        training = StagedTraining(model, settings, loss, batch, watch, budget, final, cache, keys, show, processes)
        for number, parts in enumerate(settings.train):
            training.stage(number, parts)
    if processes.rank == 0:
        notes = {name: getattr(training, name) for name in ("trained", "scored", "rows", "peak_bytes")}
        cache.store_tensors("retrained", key, training.tensors, notes)
    processes.wait()


class StagedTraining:
    """The shared state and the results of the stages of a retraining.

    Attributes:
        rows: the history (see `nla.retrain.history.History`).
        tensors: the trained parameters, by name.
        trained: the largest number of parameters that one stage trained.
        scored: number of parameters with importance scores.
        peak_bytes: peak memory of the gradient of one micro-batch.
    """

    def __init__(
        self,
        model: Model,
        settings: Retraining,
        loss: Callable[[Sample], Tensor],
        batch: Callable[[int], list[Sample]],
        watch: Callable[[], Row] | None,
        budget: Adaptive | None,
        final: int,
        cache: Cache,
        keys: list[str],
        show: Callable[[Row], None],
        processes: OneProcess,
    ) -> None:
        self.model, self.settings, self.loss, self.batch, self.watch = model, settings, loss, batch, watch
        self.budget, self.final, self.cache, self.keys = budget, final, cache, keys
        self.show, self.processes = show, processes
        self.terms, matrices = kernel_terms(model.module), matrix_terms(model.module)
        self.matrices = {name: matrix_of(name, matrices) for name in self.terms}
        self.rows: list[Row] = []
        self.tensors: dict[str, Tensor] = {}
        self.trained = self.scored = self.peak_bytes = 0

    def stage(self, number: int, parts: list[str]) -> None:
        """Train these parts. If the budget tightens, the masked triplets are dropped when the cool-down begins."""
        trained = chosen_parts(self.model.module, parts, self.settings.own_rates)
        if not trained:
            raise UserError(f"retrain.train={'+'.join(parts)} names no parameter of this model")
        owned_by_module(trained, self.processes)
        self.trained = max(self.trained, sum(t.parameter.numel() for t in trained))
        masks = self.tightening(trained)
        recipe = replace(self.settings.recipe, begin=number * self.settings.recipe.steps)
        label = f"retrain {'+'.join(parts)}"
        if masks is None:
            progress = self.train_until(trained, recipe, label, self.keys[number])
        else:
            self.scored = sum(t.parameter.numel() for t in trained if t.name.rpartition(".")[0] in self.terms)
            progress = self.train_until(trained, recipe, label, self.keys[number], masks)
            if progress.done < recipe.end:
                trained = drop_from_training(self.terms, masks.masks, trained, progress)
                budget, masks = masks.final, None  # frees the importance scores and the tensors with all triplets
                progress = self.train_until(trained, recipe, label, self.keys[-1], None, progress, budget)
        self.peak_bytes = max(self.peak_bytes, progress.peak_bytes)
        self.tensors |= {t.name: t.parameter.detach() for t in trained}

    def train_until(
        self,
        trained: list[TrainedParameter],
        recipe: Recipe,
        label: str,
        key: str,
        masks: Tightening | None = None,
        progress: Progress | None = None,
        budget: int | None = None,
    ) -> Progress:
        """Train to the end of the recipe or, if there are masks, to the beginning of the cool-down, when they are final.

        A checkpoint ends every part of the training but the last, which ends with the result.
        """

        def shown(row: Row) -> None:
            self.rows.append(row)
            self.show(row)

        own = {t.name: t for t in trained if t.owner == self.processes.rank}
        constraints, beside = Constraints(self.terms, own), self.beside
        kept = beside + sum(term.count() for term in self.terms.values())
        asked = kept if budget is None else beside + budget
        history = History(constraints, self.matrices, masks, asked, kept, beside, self.watch, recipe, shown)
        until = masks.cool_down if masks else recipe.end if recipe.end < self.settings.steps else None
        return train(trained, self.loss, self.batch, recipe, self.cache, key, label, history, self.processes, progress, until)

    def tightening(self, trained: list[TrainedParameter]) -> Tightening | None:
        """The masks of the model's triplets; None if the budget does not tighten."""
        if self.budget is None:
            return None
        by_name = {t.name: t for t in trained}
        owners = [by_name[f"{name}.mu"].owner for name in self.terms]
        moved = [
            Triplets(*(by_name[f"{name}.{part}"].master for part in TENSORS)) if owner == self.processes.rank else term.triplets
            for (name, term), owner in zip(self.terms.items(), owners, strict=True)
        ]
        return Tightening(self.budget, moved, self.final - self.beside, self.settings.steps, self.processes, owners)

    @property
    def beside(self) -> int:
        """Numbers of the compressed matrices that no `KernelTerm` has, such as scales and codes."""
        stored, droppable = (sum(n for n, _ in shares(list(t.values()))) for t in (matrix_terms(self.model.module), self.terms))
        return stored - droppable


@contextmanager
def loss_function(
    model: Model, layers: Sequence[str], settings: Retraining, load_dense: Callable[[], Model]
) -> Iterator[Callable[[Sample], Tensor]]:
    """Context with the loss: the model's own, or `Distillation` if the settings compare with the dense model."""
    if not settings.distils:
        yield partial(own_loss, model, settings.products)
        return
    dense = load_dense()
    dense.module.requires_grad_(False)
    with closing(Distillation(model, dense, list(layers), settings)) as loss:
        yield loss


def own_loss(model: Model, products: torch.dtype, sample: Sample) -> Tensor:
    """The model's own loss, with matrix products in this type: ()"""
    with products_in(products, sample.inputs.device):
        logits = model.logits(sample.inputs)
    return model.loss_of(logits, sample)


def batches(model: Model, settings: Retraining, seed: int) -> Callable[[int], list[Sample]]:
    """A function: step -> its micro-batches. They depend on the seed and the step alone."""

    def batch(step: int) -> list[Sample]:
        step_seed = seed_of(seed, step)
        samples = settings.data.samples(model, settings.batch, settings.length, step_seed)
        parts = [samples[i : i + settings.micro] for i in range(0, settings.batch, settings.micro)]
        return [Sample(torch.cat([s.inputs for s in part]), torch.cat([s.targets for s in part])) for part in parts]

    return batch


def watched_loss(model: Model, data: Data, count: int, length: int, seed: int) -> Callable[[], Row]:
    """A function that measures the model's loss (nats) on `count` random samples and, for text, its perplexity."""
    samples = data.samples(model, count, length, seed)

    def measure() -> Row:
        loss = mean_loss(model.loss, samples, next(model.module.parameters()).device)
        return {"watched": loss} | ({"watched_perplexity": math.exp(min(loss, 700))} if data.kind == "text" else {})

    return measure


@contextmanager
def recomputed_blocks(model: Model, layers: Sequence[str]) -> Iterator[None]:
    """Context in which blocks keep only their inputs and recompute activations in the backward pass (Chen et al., 2016)."""
    blocks = [block.module for block in chain(model, layers)]
    own = [vars(block).get("forward") for block in blocks]  # a model over several GPUs has its hooks there
    for block in blocks:
        forward = block.forward

        def again(*arguments: Any, forward: Callable = forward, **keywords: Any) -> Any:
            return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **keywords)

        block.forward = again
    try:
        yield
    finally:
        for block, before in zip(blocks, own, strict=True):
            del block.forward
            if before is not None:
                block.forward = before
