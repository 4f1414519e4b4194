"""A training loop that resumes after a crash. Interruptions and the number of threads do not change its result.

Several processes divide the micro-batches. They also divide the gradients, optimiser state and importance scores. Each process
holds all weights (ZeRO, stage 2, Rajbhandari et al., 2020; FSDP's SHARD_GRAD_OP).
"""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from nla.machine.cache import Cache
from nla.machine.errors import NonFiniteError
from nla.machine.peak_memory import PeakMemory
from nla.machine.threads import ordered_map
from nla.models.base import Sample
from nla.training.checkpoints import Checkpoints, Progress
from nla.training.observer import Observer
from nla.training.parameters import TrainedParameter
from nla.training.processes import OneProcess

SMOOTHING = 0.9  # decay of the running average that a step's loss is compared with


@dataclass(frozen=True)
class Recipe:
    """Hyper-parameters of AdamW with a linear warm-up of the learning rate and a cosine decay to zero.

    Args:
        steps: number of optimiser steps.
        lr: the highest learning rate.
        warmup: number of steps in which the learning rate rises.
        weight_decay: for matrices; vectors (biases, norms) have no decay.
        clip: largest norm of the whole gradient.
        checkpoint: steps between two checkpoints; None for a tenth of all steps.
        spike: training stops with an error if the loss exceeds its running average by more than this; None for no limit.
        begin: number of the first step, if steps are counted over several trainings.
    """

    steps: int
    lr: float
    warmup: int
    weight_decay: float
    clip: float
    checkpoint: int | None = None
    spike: float | None = None
    begin: int = 0

    @property
    def end(self) -> int:
        """The step count at the end of this training: begin + steps."""
        return self.begin + self.steps

    def rate(self, step: int) -> float:
        """The learning rate of step number `step`."""
        done = step - self.begin
        rising = min(1.0, (done + 1) / (self.warmup + 1))
        return self.lr * rising * 0.5 * (1 + math.cos(math.pi * done / self.steps))

    def checkpoints(self, done: int) -> bool:
        """Whether a checkpoint is written after `done` steps."""
        return (done - self.begin) % (self.checkpoint or max(1, self.steps // 10)) == 0 and done < self.end


def train(
    trained: Sequence[TrainedParameter],
    loss: Callable[[Sample], Tensor],
    batch: Callable[[int], list[Sample]],
    recipe: Recipe,
    cache: Cache,
    key: str,
    label: str,
    observer: Observer | None = None,
    processes: OneProcess | None = None,
    progress: Progress | None = None,
    until: int | None = None,
) -> Progress:
    """Train in place. Resumes from the last checkpoint under `key` or, without one, starts from `progress` or the beginning.

    Each micro-batch runs in a worker with one thread, and the gradients are averaged in order. So the result does not depend on
    the number of threads. Returns the progress at the end.

    Args:
        loss: micro-batch -> its mean loss, ().
        batch: step -> the micro-batches of that step. They must depend on the step alone.
        label: shown before the progress bar and in error messages.
        observer: called at every step.
        progress: the state of an earlier training that this one continues; None for a new training.
        until: stop when so many steps are done, and save a checkpoint; None to train to the end of the recipe.

    Raises:
        NonFiniteError: a loss or gradient is not finite, or the loss jumps by more than `recipe.spike`; it names the step, the
            batch and the last checkpoint.
    """
    observer, processes = observer or Observer(), processes or OneProcess()
    parameters, own = [t.parameter for t in trained], [t for t in trained if t.owner == processes.rank]
    device = parameters[0].device
    optimiser = torch.optim.AdamW(groups(own, recipe), lr=recipe.lr, betas=(0.9, 0.95), fused=True)
    checkpoints = Checkpoints(cache, key, own, observer, processes)
    kept = checkpoints.restore()
    progress = kept or progress or Progress(recipe.begin)
    for t in own:
        optimiser.state[t.master] = progress.moments.setdefault(t.name, {})
    publish(trained, processes)
    if progress.done == recipe.begin:
        observer.begin()
    elif kept is None:
        checkpoints.save(progress)

    def gradient(sample: Sample) -> tuple[float, tuple[Tensor, ...]]:
        value = loss(sample.to(device))
        return float(value.detach()), torch.autograd.grad(value, parameters)

    steps, quiet = range(progress.done, until or recipe.end), processes.rank > 0
    before = progress.done - recipe.begin
    bar = tqdm(steps, label, recipe.steps, initial=before, unit="step", dynamic_ncols=True, disable=quiet)
    for step in bar:
        micro = batch(step)
        if step == recipe.begin:
            with PeakMemory(device) as memory:
                gradient(micro[0])
            progress.peak_bytes = memory.peak_bytes
        total, mean = mean_gradient(gradient, micro, trained, device, processes)
        observer.after_gradient(step, mean)
        norm = float(torch.nn.utils.get_total_norm(mean.values()))
        total, square = processes.total(total, norm**2)
        norm = math.sqrt(square)
        where = f"{label}: step {step}, batch {step} ({recipe.end} steps of {len(micro)} micro-batches)"
        smoothed = progress.smoothed
        if recipe.spike is not None and smoothed is not None and total > smoothed + recipe.spike:
            what = f"the loss leaps from {smoothed:.3f} to {total:.3f}, by more than spike={recipe.spike}"
            raise NonFiniteError(f"{where}: {what}; {checkpoints.told()}")
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise NonFiniteError(f"{where}: the loss is {total}, its gradient's norm {norm}; {checkpoints.told()}")
        progress.smoothed = total if smoothed is None else SMOOTHING * smoothed + (1 - SMOOTHING) * total
        for t in own:
            t.master.grad = mean[t.name].mul_(min(1.0, recipe.clip / (norm + 1e-6)))
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate(step) * group["rate"]
        optimiser.step()
        optimiser.zero_grad()  # frees this step's gradients before those of the next step are made
        mean.clear()
        observer.before_publishing(step + 1)
        publish(trained, processes)
        observer.after_step(step + 1, {"loss": total, "lr": recipe.rate(step), "norm": norm})
        bar.set_postfix_str(f"loss {total:.3f}", refresh=False)
        progress.done = step + 1
        if recipe.checkpoints(step + 1) or step + 1 == until:
            checkpoints.save(progress)
    return progress


def publish(trained: Sequence[TrainedParameter], processes: OneProcess) -> None:
    """Copy the numbers that the optimiser updates into the model's parameters, in every process."""
    for t in trained:
        if t.owner == processes.rank:
            t.publish()
    processes.hand_out([t.parameter.detach() for t in trained], [t.owner for t in trained])


def groups(trained: Sequence[TrainedParameter], recipe: Recipe) -> list[dict[str, Any]]:
    """AdamW's parameter groups: one for each pair of weight decay and learning rate."""
    found: dict[tuple[float, float], list[Tensor]] = {}
    for t in trained:
        decay = recipe.weight_decay if t.parameter.ndim > 1 else 0.0
        found.setdefault((decay, t.rate), []).append(t.master)
    return [{"params": masters, "weight_decay": decay, "rate": rate} for (decay, rate), masters in found.items()]


def mean_gradient(
    gradient: Callable[[Sample], tuple[float, tuple[Tensor, ...]]],
    micro: list[Sample],
    trained: Sequence[TrainedParameter],
    device: torch.device,
    processes: OneProcess,
) -> tuple[float, dict[str, Tensor]]:
    """This process's share of the mean loss, and {name: mean gradient over all processes, in fp32} of its own parameters."""
    total, mean = 0.0, {t.name: torch.zeros_like(t.master) for t in trained if t.owner == processes.rank}
    with closing(ordered_map(gradient, micro[processes.rank :: processes.size], device)) as results:
        for value, gradients in results:
            total += value / len(micro)
            for t, g in zip(trained, gradients, strict=True):
                part = g.to(torch.promote_types(g.dtype, torch.float32))
                processes.collect(part, t.owner)
                if t.owner == processes.rank:
                    mean[t.name].add_(part, alpha=1 / len(micro))
            del gradients, g, part
    return total, mean
