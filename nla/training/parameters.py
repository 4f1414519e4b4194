"""The parameters of a training, and the processes that own them."""

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from nla.machine.errors import UserError
from nla.training.processes import OneProcess, assign_owners


class TrainedParameter:
    """A parameter to train.

    Args:
        name: qualified name.
        rate: factor on the recipe's learning rate.
        owner: rank of the process that keeps its gradient and optimiser state.
    """

    def __init__(self, name: str, parameter: Tensor, rate: float = 1.0, owner: int = 0) -> None:
        self.name, self.parameter, self.rate, self.owner = name, parameter, rate, owner

    @cached_property
    def master(self) -> Tensor:
        """The tensor that the owner's optimiser updates: an fp32 copy of a 16-bit parameter, otherwise the parameter itself."""
        narrow = self.parameter.dtype in (torch.bfloat16, torch.float16)
        return self.parameter.detach().float() if narrow else self.parameter.detach()

    @torch.no_grad()
    def publish(self) -> None:
        """Copy the master into the parameter, rounded to the parameter's type."""
        if self.master.dtype != self.parameter.dtype:
            self.parameter.copy_(self.master)


def owned_by_module(trained: Sequence[TrainedParameter], processes: OneProcess) -> None:
    """Divide the parameters among the processes, in place. All parameters of a module get the same owner.

    Raises:
        UserError: the model has fewer trained modules than processes.
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
    """All parameters of the model that require a gradient."""
    return [TrainedParameter(name, p) for name, p in module.named_parameters() if p.requires_grad]
