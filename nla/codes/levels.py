"""The levels of a grid: which multiples of a group's scale a code stands for."""

from typing import Protocol

import torch
from torch import Tensor

SHRINKAGE = tuple(0.9**k for k in range(19))  # fractions of a group's range that are tried, down to 0.15 (1 bit needs 0.2)
QLORA_OFFSET = 0.9677083  # the largest quantile of the NF4 table


class Levels(Protocol):
    """Values x scale, one for each code 0 .. 2^width - 1.

    Attributes:
        width: bits of a code.
        has_zeros: each group has a zero point, a code of its own.
    """

    width: int
    has_zeros: bool

    def values(self, codes: Tensor, zeros: Tensor) -> Tensor:
        """The values of codes, in units of the scale, fp32."""

    def nearest(self, values: Tensor, zeros: Tensor) -> Tensor:
        """The codes whose values are nearest to these values, as floating-point numbers."""

    def starts(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Scales and zeros (starts, ..., 1) worth trying for groups of weights (..., group)."""


class Uniform:
    """The value of a code is code - zero - 1/2, with a zero point in 0 .. 2^width - 1.

    The half makes levels possible that are symmetric about 0: at 2 bits -1.5, -0.5, 0.5 and 1.5.
    """

    has_zeros = True

    def __init__(self, width: int) -> None:
        self.width = width

    def values(self, codes: Tensor, zeros: Tensor) -> Tensor:
        return codes - (zeros + 0.5)

    def nearest(self, values: Tensor, zeros: Tensor) -> Tensor:
        return (values + (zeros + 0.5)).round_().clamp_(0, 2**self.width - 1)

    def starts(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Shrunk ranges, from the smallest to the largest weight and symmetric about 0."""
        steps = 2**self.width - 1
        low, high = groups.amin(-1, keepdim=True).clamp(max=0), groups.amax(-1, keepdim=True).clamp(min=0)
        scale = (high - low) / steps
        zeros = (-low / torch.where(scale > 0, scale, 1.0) - 0.5).round().clamp(0, steps)
        size = 2 * torch.maximum(high, -low) / steps
        middle = torch.full_like(zeros, (steps - 1) // 2)
        scales = torch.cat((scale * shrinkage(groups), size * shrinkage(groups)))
        return scales, torch.stack((zeros, middle)).repeat_interleave(len(SHRINKAGE), 0)


class NormalFloat:
    """NF4 of QLoRA (Dettmers et al., 2023): 16 quantiles of a normal distribution, scaled to -1 .. 1; one of them is 0."""

    has_zeros = False
    width = 4

    def __init__(self) -> None:
        with torch.device("cpu"):  # not on the meta device, on which transformers builds a model
            above = torch.special.ndtri(torch.linspace(QLORA_OFFSET, 0.5, 9, dtype=torch.float64))  # the last one is 0
            below = -torch.special.ndtri(torch.linspace(QLORA_OFFSET, 0.5, 8, dtype=torch.float64))[:-1]
            self.table = (torch.cat((below, above.flip(0))) / above[0]).float()
            self.borders = (self.table[1:] + self.table[:-1]) / 2

    def values(self, codes: Tensor, zeros: Tensor) -> Tensor:
        return self.table.to(codes.device)[codes.int()]

    def nearest(self, values: Tensor, zeros: Tensor) -> Tensor:
        return torch.bucketize(values, self.borders.to(values)).to(values)

    def starts(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Shrunk ranges, symmetric about 0."""
        size = groups.abs().amax(-1, keepdim=True)
        scales = size * shrinkage(groups)
        return scales, torch.zeros_like(scales)


def shrinkage(groups: Tensor) -> Tensor:
    """SHRINKAGE as a tensor (starts, 1, ..., 1) with one dimension more than `groups`."""
    return torch.tensor(SHRINKAGE, device=groups.device).view(-1, *(1 for _ in groups.shape))


def levels_of(name: str, width: int) -> Levels:
    """The levels `uniform` in this width, or `nf4`, which has 4 bits."""
    return NormalFloat() if name == "nf4" else Uniform(width)
