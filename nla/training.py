"""A training loop whose result depends on its recipe alone, and that goes on after a crash."""

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nla.cache import Cache
from nla.crew import Crew
from nla.errors import NonFiniteError
from nla.memory import PeakMemory
from nla.models.base import Sample
from nla.workers import ordered_map

SMOOTHING = 0.9  # of the loss that a step's loss is compared with


@dataclass(frozen=True)
class Recipe:
    """AdamW with a linear warm-up and a cosine to zero.

    Args:
        steps, warmup: optimiser steps.
        lr: the highest learning rate.
        weight_decay: of matrices; vectors (biases, norms) have none.
        clip: largest norm of the whole gradient.
        checkpoint: steps between two checkpoints; None: a tenth of all.
        spike: a loss (nats) so far above its smoothed value ends the training; None: none does.
    """

    steps: int
    lr: float
    warmup: int
    weight_decay: float
    clip: float
    checkpoint: int | None = None
    spike: float | None = None

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        rising = min(1.0, (step + 1) / (self.warmup + 1))
        return self.lr * rising * 0.5 * (1 + math.cos(math.pi * step / self.steps))

    def checkpoints(self, done: int) -> bool:
        """Whether the state after `done` steps is kept."""
        return done % (self.checkpoint or max(1, self.steps // 10)) == 0 and done < self.steps


class Trained:
    """A parameter, the fp32 numbers that the optimiser moves (itself, unless its type is narrower), and its own rate."""

    def __init__(self, name: str, parameter: Tensor, rate: float = 1.0) -> None:
        self.name, self.parameter, self.rate = name, parameter, rate
        narrow = parameter.dtype in (torch.bfloat16, torch.float16)
        self.master = parameter.detach().float() if narrow else parameter.detach()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the optimiser's numbers to those the model computes with."""
        if self.master.dtype != self.parameter.dtype:
            self.parameter.copy_(self.master)


class Companion:
    """Goes along with a training: sees its gradients and steps, and is kept with its checkpoints."""

    def begin(self) -> None:
        """Before the first step; not after a restore."""

    def after_gradient(self, done: int, gradients: list[Tensor]) -> None:
        """After the mean gradient of the step that follows `done` steps, before it is clipped."""

    def before_publishing(self, done: int) -> None:
        """After the optimiser has moved the masters, before the model sees them."""

    def after_step(self, done: int, figures: dict[str, float]) -> None:
        """At the end of a step; `figures`: loss, lr and norm of the gradient."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that its next steps depend on."""
        return {}

    def notes(self) -> Any:
        """What else it needs, as JSON."""
        return None

    def restore(self, tensors: dict[str, Tensor], notes: Any) -> None:
        """Be as it was when tensors() and notes() were kept."""


def whole_model(module: nn.Module) -> list[Trained]:
    """Every parameter that asks for a gradient."""
    return [Trained(name, p) for name, p in module.named_parameters() if p.requires_grad]


def train(
    trained: Sequence[Trained],
    loss: Callable[[Sample], Tensor],
    batch: Callable[[int], list[Sample]],
    recipe: Recipe,
    cache: Cache,
    key: str,
    label: str,
    companion: Companion | None = None,
    crew: Crew | None = None,
) -> int:
    """Train in place, from the last checkpoint under `key` if there is one; peak bytes of one micro-batch's gradient.

    `batch(step)` must be a function of the step alone. It gives the micro-batches of a step; each runs in a worker with one
    thread, and their gradients are averaged in order, so that the result does not depend on the number of threads. The
    processes of a crew share the micro-batches out.

    Raises:
        NonFiniteError: a loss or gradient is not finite, or the loss leaps; it names step, batch and last checkpoint.
    """
    companion, crew = companion or Companion(), crew or Crew()
    parameters = [t.parameter for t in trained]
    device = parameters[0].device
    optimiser = torch.optim.AdamW(groups(trained, recipe), lr=recipe.lr, betas=(0.9, 0.95), fused=True)
    begun, smoothed, peak = restore(cache, key, trained, optimiser, companion)
    crew.wait()
    if begun == 0:
        companion.begin()

    def gradient(sample: Sample) -> tuple[float, tuple[Tensor, ...]]:
        value = loss(sample.to(device))
        return float(value.detach()), torch.autograd.grad(value, parameters)

    steps, quiet = range(begun, recipe.steps), crew.rank > 0
    bar = tqdm(steps, label, recipe.steps, initial=begun, unit="step", dynamic_ncols=True, disable=quiet)
    for step in bar:
        micro = batch(step)
        if step == 0:
            with PeakMemory(device) as memory:
                gradient(micro[0])
            peak = memory.peak_bytes
        total, mean = mean_gradient(gradient, micro, trained, device, crew)
        where = f"{label}: step {step}, batch {step} ({recipe.steps} steps of {len(micro)} micro-batches)"
        if recipe.spike is not None and smoothed is not None and total > smoothed + recipe.spike:
            what = f"the loss leaps from {smoothed:.3f} to {total:.3f}, by more than spike={recipe.spike}"
            raise NonFiniteError(f"{where}: {what}; {last_checkpoint(cache, key)}")
        norm = float(torch.nn.utils.get_total_norm(mean))
        if not (math.isfinite(total) and math.isfinite(norm)):
            raise NonFiniteError(f"{where}: the loss is {total}, its gradient's norm {norm}; {last_checkpoint(cache, key)}")
        smoothed = total if smoothed is None else SMOOTHING * smoothed + (1 - SMOOTHING) * total
        companion.after_gradient(step, mean)
        for t, g in zip(trained, mean, strict=True):
            t.master.grad = g.mul_(min(1.0, recipe.clip / (norm + 1e-6)))
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate(step) * group["rate"]
        optimiser.step()
        companion.before_publishing(step + 1)
        for t in trained:
            t.publish()
        companion.after_step(step + 1, {"loss": total, "lr": recipe.rate(step), "norm": norm})
        bar.set_postfix_str(f"loss {total:.3f}", refresh=False)
        if recipe.checkpoints(step + 1) and crew.rank == 0:
            save(cache, key, step + 1, smoothed, peak, trained, optimiser, companion)
    optimiser.zero_grad()
    return peak


def groups(trained: Sequence[Trained], recipe: Recipe) -> list[dict[str, Any]]:
    """The optimiser's groups: one for each weight decay and rate."""
    found: dict[tuple[float, float], list[Tensor]] = {}
    for t in trained:
        decay = recipe.weight_decay if t.parameter.ndim > 1 else 0.0
        found.setdefault((decay, t.rate), []).append(t.master)
    return [{"params": masters, "weight_decay": decay, "rate": rate} for (decay, rate), masters in found.items()]


def mean_gradient(
    gradient: Callable[[Sample], tuple[float, tuple[Tensor, ...]]],
    micro: list[Sample],
    trained: Sequence[Trained],
    device: torch.device,
    crew: Crew,
) -> tuple[float, list[Tensor]]:
    """Mean loss and gradient over the micro-batches of the whole crew, in fp32."""
    total, mean = 0.0, [torch.zeros_like(t.master) for t in trained]
    with closing(ordered_map(gradient, micro[crew.rank :: crew.size], device)) as results:
        for value, gradients in results:
            total += value / len(micro)
            torch._foreach_add_(mean, [g.to(m.dtype) for g, m in zip(gradients, mean, strict=True)], alpha=1 / len(micro))
    return crew.sum(total, mean), mean


def last_checkpoint(cache: Cache, key: str) -> str:
    """Where the last good state is, for a person."""
    path = cache.root / "trainings" / f"{key}.safetensors"
    entry = cache.load_tensors("trainings", key)
    return f"the last good checkpoint is of step {entry[1]['step']}, {path}" if entry else "there is no checkpoint before it"


def save(
    cache: Cache,
    key: str,
    step: int,
    smoothed: float,
    peak: int,
    trained: Sequence[Trained],
    optimiser: torch.optim.Optimizer,
    companion: Companion,
) -> None:
    """The state before `step`, in place of an earlier one."""
    tensors = {f"model.{t.name}": t.master for t in trained}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{name}": value for name, value in state.items()}
    tensors |= {f"companion.{name}": value for name, value in companion.tensors().items()}
    notes = {"step": step, "smoothed": smoothed, "peak": peak, "companion": companion.notes()}
    cache.store_tensors("trainings", key, tensors, notes)


def restore(
    cache: Cache, key: str, trained: Sequence[Trained], optimiser: torch.optim.Optimizer, companion: Companion
) -> tuple[int, float | None, int]:
    """Load the checkpoint, if there is one: the step to go on with, the smoothed loss, peak bytes."""
    entry = cache.load_tensors("trainings", key)
    if entry is None:
        return 0, None, 0
    tensors, notes = entry
    for t in trained:
        t.master.copy_(tensors[f"model.{t.name}"])
        t.publish()
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimiser":
            i, _, quantity = rest.partition(".")
            state.setdefault(int(i), {})[quantity] = value
    optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
    companion.restore(
        {name.removeprefix("companion."): t for name, t in tensors.items() if name.startswith("companion.")}, notes["companion"]
    )
    return notes["step"], notes["smoothed"], notes["peak"]
