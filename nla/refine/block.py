"""Block refinement: the terms of a block are trained on the block's own outputs.

Source: the second stage of AA-SVD (Sinha and Fleuret, 2026, arXiv 2604.02119), for terms of any kernel. The block's inputs have
passed the compressed blocks before it, its targets are the outputs of the dense block for the dense model's inputs. So each
block also corrects the errors of the blocks before it.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from nla.compressed.contents import kernel_terms, replace_parameters
from nla.machine.cache import Cache
from nla.machine.device import products_in
from nla.machine.seeds import seed_of
from nla.models.base import Sample
from nla.refine.settings import Refinement
from nla.retrain.constraints import Constraints
from nla.retrain.trainable import chosen_parts, pack_terms, prepare_terms
from nla.statistics.blocks import Block, Stream, rows
from nla.training.loop import Recipe, train
from nla.training.mean_loss import mean_loss
from nla.training.observer import Observer
from nla.training.parameters import TrainedParameter

SMALLEST = 1e-12  # squared size of a position from which on errors are relative to it


@dataclass(frozen=True)
class Refined:
    """The result of refining one block. Errors are of its outputs for the held-out samples, see `relative_error`.

    Attributes:
        block: qualified name.
        before, after: the error of the fitted and of the refined block.
        epoch: the epoch that was kept; 0 if no epoch is better than the fits.
        steps: optimiser steps in all.
        trained: number of trained parameters.
        peak_bytes: peak memory of the gradient of one micro-batch.
        seconds: wall time.
    """

    block: str
    before: float
    after: float
    epoch: int
    steps: int
    trained: int
    peak_bytes: int
    seconds: float


def refine_block(
    block: Block, stream: Stream, targets: list[Tensor], settings: Refinement, seed: int, cache: Cache, key: str
) -> Refined:
    """Train the block in place, and store the result in the cache under `key`.

    Args:
        block: a block whose layers are compressed.
        stream: the block's inputs, behind the compressed blocks before it.
        targets: the outputs of the dense block, one for each state of the stream.
        seed: of the order of the samples.

    Raises:
        NonFiniteError: a loss or gradient is not finite; it names the block and the step.
    """
    begun = time.perf_counter()
    prepare_terms(block.module, 0, seed)
    trained = chosen_parts(block.module, settings.parts)
    pairs = [Sample(state, target) for state, target in zip(stream.states, targets, strict=True)]
    count = min(max(1, round(settings.held_out * len(pairs))), len(pairs) - 1)
    learnt, held_out = pairs[count:], pairs[:count]

    def loss(sample: Sample) -> Tensor:
        with products_in(settings.products, sample.inputs.device):
            output = stream.run(block, sample.inputs)
        return relative_error(output, sample.targets)

    def measure() -> float:
        return mean_loss(loss, held_out, stream.device)

    size = max(1, settings.batch // rows(pairs[0].inputs))  # states of a step; each is a micro-batch
    each = -(-len(learnt) // size)  # steps of an epoch
    steps = settings.epochs * each
    warmup = int(settings.warmup * steps)
    recipe = Recipe(steps, settings.lr, warmup, settings.weight_decay, settings.clip, checkpoint=steps)  # none on the way
    best = BestEpoch(Constraints(kernel_terms(block.module), {t.name: t for t in trained}), trained, each, measure)
    batch = batches(learnt, size, each, seed)
    if trained:
        peak_bytes = train(trained, loss, batch, recipe, cache, key, f"refine {block.name}", best).peak_bytes
    else:  # `refine.train` names triplets alone, and the budget leaves all matrices of the block dense
        best.begin()
        steps = peak_bytes = 0
    replace_parameters(block.module, best.tensors_of_best)
    pack_terms(block.module)
    result = Refined(
        block=block.name,
        before=best.errors[0],
        after=min(best.errors),
        epoch=best.errors.index(min(best.errors)),
        steps=steps,
        trained=sum(t.parameter.numel() for t in trained),
        peak_bytes=peak_bytes,
        seconds=time.perf_counter() - begun,
    )
    cache.store_tensors("refined", key, best.tensors_of_best, vars(result))
    return result


def load_refined(block: Block, cache: Cache, key: str, seed: int) -> Refined | None:
    """Load the result of an earlier refinement into the fitted block, or return None if the cache has none."""
    entry = cache.load_tensors("refined", key)
    if entry is None:
        return None
    tensors, figures = entry
    prepare_terms(block.module, 0, seed)
    replace_parameters(block.module, tensors)
    pack_terms(block.module)
    return Refined(**figures)


def relative_error(output: Tensor, target: Tensor) -> Tensor:
    """Mean over positions of |y' - y|^2 / |y|^2: (..., features), (..., features) -> ().

    It is relative at every position, because a few positions (such as a text's first token) have outputs that are hundreds of
    times as large as those of all others.
    """
    target = target.to(output.device).float()  # a block may be on another GPU than the model's inputs
    difference = (output.float() - target).square().sum(-1)
    return (difference / target.square().sum(-1).clamp_min(SMALLEST)).mean()


def batches(learnt: list[Sample], size: int, each: int, seed: int) -> Callable[[int], list[Sample]]:
    """A function: step -> its micro-batches. Every epoch of `each` steps reads all samples in another order."""

    def batch(step: int) -> list[Sample]:
        epoch, within = divmod(step, each)
        generator = torch.Generator().manual_seed(seed_of(seed, epoch))
        order = torch.randperm(len(learnt), generator=generator).tolist()
        return [learnt[i] for i in order[within * size : (within + 1) * size]]

    return batch


class BestEpoch(Observer):
    """Measures the error on held-out samples before the training and after every epoch, and keeps the best parameters.

    Args:
        constraints: surfaces on which the triplets stay.
        each: steps of an epoch.
        measure: the current error on the held-out samples.

    Attributes:
        errors: the error at the start and after every epoch.
        tensors_of_best: the parameters by name, as they were at the smallest error.
    """

    def __init__(
        self, constraints: Constraints, trained: list[TrainedParameter], each: int, measure: Callable[[], float]
    ) -> None:
        self.constraints, self.trained, self.each, self.measure = constraints, trained, each, measure
        self.errors: list[float] = []
        self.tensors_of_best: dict[str, Tensor] = {}

    def begin(self) -> None:
        self.note()

    def after_gradient(self, done: int, gradients: dict[str, Tensor]) -> None:
        self.constraints.project(gradients)

    def before_publishing(self, done: int) -> None:
        self.constraints.retract()

    def after_step(self, done: int, figures: dict[str, float]) -> None:
        if done % self.each == 0:
            self.note()

    def note(self) -> None:
        error = self.measure()
        if not self.errors or error < min(self.errors):
            self.tensors_of_best = {t.name: t.parameter.detach().clone() for t in self.trained}
        self.errors.append(error if math.isfinite(error) else math.inf)
