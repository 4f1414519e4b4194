"""The processes that train one model together."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed import all_reduce, broadcast, reduce


class OneProcess:
    """A training in a single process: there is nobody to add up with or to wait for.

    Attributes:
        rank: number of this process, from 0.
        size: how many processes there are.
    """

    rank, size = 0, 1

    def total(self, *numbers: float) -> tuple[float, ...]:
        """Each number, added up over all processes."""
        return numbers

    def sum(self, tensor: Tensor) -> None:
        """Add up a tensor over all processes, in place, in each of them."""

    def collect(self, tensor: Tensor, owner: int) -> None:
        """Add up a tensor over all processes, in place, in the process `owner`. The others must not read it afterwards."""

    def hand_out(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> None:
        """Copy each tensor from the process that owns it to all others, in place."""

    def wait(self) -> None:
        """Return when all processes have called it."""


class SeveralProcesses(OneProcess):
    """One process of several, each with a GPU of its own where there are GPUs. accelerate finds and joins them."""

    def __init__(self, device: str) -> None:
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=device == "cpu")
        self.rank, self.size = self.accelerator.process_index, self.accelerator.num_processes
        self.device = str(self.accelerator.device)

    def total(self, *numbers: float) -> tuple[float, ...]:
        tensor = torch.tensor(numbers, dtype=torch.float64, device=self.device)
        self.sum(tensor)
        return tuple(tensor.tolist())

    def sum(self, tensor: Tensor) -> None:
        all_reduce(tensor)

    def collect(self, tensor: Tensor, owner: int) -> None:
        reduce(tensor, owner)

    def hand_out(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> None:
        for tensor, owner in zip(tensors, owners, strict=True):
            broadcast(tensor, owner)

    def wait(self) -> None:
        self.accelerator.wait_for_everyone()


def assign_owners(sizes: dict[str, int], count: int) -> dict[str, int]:
    """{name: process that owns it}, for `count` processes: the largest first, each to the process that has least."""
    load, owners = [0] * count, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = load.index(min(load))
        load[owners[name]] += sizes[name]
    return owners
