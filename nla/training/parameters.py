"""What a training moves, and what goes along with it."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from nla.machine.errors import UserError
from nla.training.processes import OneProcess, assign_owners


class TrainedParameter:
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


def owned_by_module(trained: Sequence[TrainedParameter], processes: OneProcess) -> None:
    """Share the parameters out among the processes, those of one module to the same.

    Raises:
        UserError: there are fewer modules than processes.
    """
    sizes: dict[str, int] = {}
    for t in trained:
        module = t.name.rpartition(".")[0]
        sizes[module] = sizes.get(module, 0) + t.parameter.numel()
    if len(sizes) < processes.size:
        raise UserError(
            f"retrain.processes={processes.size} have {len(sizes)} trained modules to share; allowed: 1 to {len(sizes)}"
        )
    owners = assign_owners(sizes, processes.size)
    for t in trained:
        t.owner = owners[t.name.rpartition(".")[0]]


def whole_model(module: nn.Module) -> list[TrainedParameter]:
    """Every parameter that asks for a gradient."""
    return [TrainedParameter(name, p) for name, p in module.named_parameters() if p.requires_grad]
