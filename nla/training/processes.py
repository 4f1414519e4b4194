"""The processes that train one model together."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed import all_reduce, broadcast, init_process_group, reduce


class OneProcess:
    """The only process of a training. Its collective operations do nothing.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes.
    """

    rank, size = 0, 1

    def total(self, *numbers: float) -> tuple[float, ...]:
        """Each number, summed over all processes."""
        return numbers

    def sum(self, tensor: Tensor) -> None:
        """Sum a tensor over all processes, in place. Every process gets the sum."""

    def collect(self, tensor: Tensor, owner: int) -> None:
        """Sum a tensor over all processes, in place. Only `owner` gets the sum; the others must not read the tensor again."""

    def hand_out(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> None:
        """Copy each tensor from the process that owns it to all other processes, in place."""

    def wait(self) -> None:
        """Wait until all processes have called this method."""


@dataclass(frozen=True)
class Place:
    """The place of one process among `size` processes of this machine, which find one another by a file `meeting`."""

    rank: int
    size: int
    meeting: Path


class SeveralProcesses(OneProcess):
    """One of several processes, each with one GPU if there are GPUs. `accelerate` gives each its device.

    Args:
        device: `cpu` or `cuda`.
    """

    def __init__(self, device: str, place: Place) -> None:
        from accelerate import Accelerator

        rank, size = str(place.rank), str(place.size)
        os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}  # accelerate reads them
        backend = "gloo" if device == "cpu" else "nccl"
        init_process_group(backend, f"file://{place.meeting}", rank=place.rank, world_size=place.size)
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
    """{name: rank of its owner} for `count` processes. The largest go first, each to the process with the smallest sum."""
    load, owners = [0] * count, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = load.index(min(load))
        load[owners[name]] += sizes[name]
    return owners
