"""A training loop whose result depends on its recipe alone, and that goes on after a crash."""

import math
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nla.cache import Cache
from nla.errors import NonFiniteError
from nla.models.base import Sample
from nla.workers import ordered_map

CHECKPOINTS = 10  # in a whole training


@dataclass(frozen=True)
class Recipe:
    """AdamW with a linear warm-up and a cosine to zero.

    Args:
        steps, warmup: optimiser steps.
        lr: the highest learning rate.
        weight_decay: of matrices; vectors (biases, norms) have none.
        clip: largest norm of the whole gradient.
    """

    steps: int
    lr: float
    warmup: int
    weight_decay: float
    clip: float

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        rising = min(1.0, (step + 1) / (self.warmup + 1))
        return self.lr * rising * 0.5 * (1 + math.cos(math.pi * step / self.steps))


def train(
    module: nn.Module,
    loss: Callable[[Sample], Tensor],
    batch: Callable[[int], list[Sample]],
    recipe: Recipe,
    cache: Cache,
    key: str,
    label: str,
) -> None:
    """Train `module` in place, from the last checkpoint under `key` if there is one.

    `batch(step)` must be a function of the step alone. It gives the micro-batches of a step; each runs in a worker with one
    thread, and their gradients are averaged in order, so that the result does not depend on the number of threads.

    Raises:
        NonFiniteError: names the step.
    """
    parameters = [p for p in module.parameters() if p.requires_grad]
    device = parameters[0].device
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": recipe.weight_decay},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95))

    def gradient(sample: Sample) -> tuple[float, tuple[Tensor, ...]]:
        value = loss(sample.to(device))
        return float(value.detach()), torch.autograd.grad(value, parameters)

    begun = restore(cache, key, module, optimiser)
    interval = max(1, recipe.steps // CHECKPOINTS)
    bar = tqdm(range(begun, recipe.steps), label, recipe.steps, initial=begun, unit="step", dynamic_ncols=True)
    for step in bar:
        micro = batch(step)
        total, mean = 0.0, [torch.zeros_like(p) for p in parameters]
        with closing(ordered_map(gradient, micro, device)) as results:
            for value, gradients in results:
                total += value / len(micro)
                torch._foreach_add_(mean, gradients, alpha=1 / len(micro))
        if not math.isfinite(total):
            raise NonFiniteError(f"{label}: the loss is {total} at step {step}")
        for p, g in zip(parameters, mean, strict=True):
            p.grad = g
        torch.nn.utils.clip_grad_norm_(parameters, recipe.clip, error_if_nonfinite=True)
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate(step)
        optimiser.step()
        bar.set_postfix_str(f"loss {total:.3f}", refresh=False)
        if (step + 1) % interval == 0 and step + 1 < recipe.steps:
            save(cache, key, step + 1, module, optimiser)
    optimiser.zero_grad()


def save(cache: Cache, key: str, step: int, module: nn.Module, optimiser: torch.optim.Optimizer) -> None:
    """The state before `step`, in place of an earlier one."""
    tensors = {f"model.{name}": p for name, p in module.named_parameters() if p.requires_grad}
    for i, state in optimiser.state_dict()["state"].items():
        tensors |= {f"optimiser.{i}.{name}": value for name, value in state.items()}
    cache.store_tensors("trainings", key, {name: p.detach() for name, p in tensors.items()}, {"step": step})


def restore(cache: Cache, key: str, module: nn.Module, optimiser: torch.optim.Optimizer) -> int:
    """Load the checkpoint, if there is one; the step to go on with."""
    entry = cache.load_tensors("trainings", key)
    if entry is None:
        return 0
    tensors, info = entry
    with torch.no_grad():
        for name, p in module.named_parameters():
            if p.requires_grad:
                p.copy_(tensors[f"model.{name}"])
    state: dict[int, dict[str, Tensor]] = {}
    for name, value in tensors.items():
        kind, _, rest = name.partition(".")
        if kind == "optimiser":
            i, _, quantity = rest.partition(".")
            state.setdefault(int(i), {})[quantity] = value
    optimiser.load_state_dict(optimiser.state_dict() | {"state": state})
    return info["step"]
