"""What a training moves, and what goes along with it."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from nla.crew import Crew, shared_out
from nla.errors import UserError


class Trained:
    """A parameter, the process that keeps its optimiser's numbers, and its own learning rate, a factor."""

    def __init__(self, name: str, parameter: Tensor, rate: float = 1.0, owner: int = 0) -> None:
        self.name, self.parameter, self.rate, self.owner = name, parameter, rate, owner

    @cached_property
    def master(self) -> Tensor:
        """The fp32 numbers that the optimiser moves, for the owner: the parameter itself, unless its type is narrower."""
        narrow = self.parameter.dtype in (torch.bfloat16, torch.float16)
        return self.parameter.detach().float() if narrow else self.parameter.detach()

    @torch.no_grad()
    def publish(self) -> None:
        """Round the optimiser's numbers to those the model computes with."""
        if self.master.dtype != self.parameter.dtype:
            self.parameter.copy_(self.master)


class Companion:
    """Goes along with a training: sees its gradients and steps, and is kept with its checkpoints."""

    def begin(self) -> None:
        """Before the first step; not after a restore."""

    def after_gradient(self, done: int, gradients: dict[str, Tensor]) -> None:
        """With the mean gradient of the step after `done`, of what this process owns; may change it, before it is clipped."""

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


def owned_by_module(trained: Sequence[Trained], crew: Crew) -> None:
    """Share the parameters out among the processes, those of one module to the same.

    Raises:
        UserError: there are fewer modules than processes.
    """
    sizes: dict[str, int] = {}
    for t in trained:
        module = t.name.rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + t.parameter.numel()
    if len(sizes) < crew.size:
        raise UserError(f"retrain.processes={crew.size} have {len(sizes)} trained modules to share; allowed: 1 to {len(sizes)}")
    owners = shared_out(sizes, crew.size)
    for t in trained:
        t.owner = owners[t.name.rpartition(".")[0]]


def whole_model(module: nn.Module) -> list[Trained]:
    """Every parameter that asks for a gradient."""
    return [Trained(name, p) for name, p in module.named_parameters() if p.requires_grad]
