"""The processes that train together."""

from collections.abc import Sequence

from torch import Tensor


class Crew:
    """One process by itself."""

    rank, size = 0, 1

    def total(self, *numbers: float) -> tuple[float, ...]:
        """Each number, added up over all processes."""
        return numbers

    def sum(self, tensor: Tensor) -> None:
        """Add up a tensor over all processes, in place, in each of them."""

    def collect(self, tensor: Tensor, owner: int) -> None:
        """Add up a tensor over all processes, in place, in the owner; in the others it is of no use afterwards."""

    def hand_out(self, tensors: Sequence[Tensor], owners: Sequence[int]) -> None:
        """Give all processes the numbers that each tensor's owner has, in place."""

    def wait(self) -> None:
        """Until all processes are here."""


def shared_out(sizes: dict[str, int], count: int) -> dict[str, int]:
    """name -> the process that keeps it: the largest first, each to the one that has least."""
    load, owners = [0] * count, {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        owners[name] = load.index(min(load))
        load[owners[name]] += sizes[name]
    return owners
