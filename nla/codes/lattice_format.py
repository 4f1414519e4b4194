"""Vectors of eight numbers in 1 to 4 bits a number: entries of lattice codebooks, and their codes as bytes."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nla.codes.lattice import E8P, E8Shell, LatticeCodebook, on_device

WIDTHS = (1, 2, 3, 4)
BLOCK = 8  # numbers of a vector


@dataclass(frozen=True)
class Stage:
    """A codebook for what the stages before it leave of a vector, and the factor of its entries."""

    codebook: LatticeCodebook
    factor: float


TWO, ONE = E8P(), E8Shell()
STAGES = {
    0: (),  # the vector of zeros
    1: (Stage(ONE, 1.0),),
    2: (Stage(TWO, 1.0),),
    3: (Stage(TWO, 1.0), Stage(ONE, 0.49)),
    4: (Stage(TWO, 1.0), Stage(TWO, 0.26)),
}

# The scale s with the smallest mean of (s nearest(x / s) - x)^2 for Gaussian numbers x of variance 1, found on a grid together
# with the factors of the second stages.
GAUSSIAN_SCALE = {1: 1.64, 2: 0.96, 3: 1.02, 4: 1.12}


@dataclass(frozen=True)
class LatticeFormat:
    """The sum of one entry for each stage (residual quantisation, QuIP#).

    Attributes:
        width: bits of a number, which are also the bytes of a vector: one of WIDTHS, or 0 for zeros.
    """

    width: int

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        return STAGES[self.width]

    @property
    def gaussian_scale(self) -> float:
        """The best scale for Gaussian numbers of variance 1."""
        return GAUSSIAN_SCALE[self.width]

    def nearest(self, x: Tensor) -> Tensor:
        """The codes of vectors (k, 8): uint8 (k, width). Each stage takes the entry nearest to what is left."""
        codes = []
        for stage in self.stages:
            code = stage.codebook.nearest(x / stage.factor)
            x = x - stage.factor * on_device(stage.codebook, x.device)[code]
            codes += [code >> 8 * byte & 255 for byte in range(stage.codebook.width)]
        return torch.stack(codes, -1).to(torch.uint8)

    def values(self, codes: Tensor) -> Tensor:
        """The vectors (..., 8), fp32, of codes (..., width)."""
        x, first = torch.zeros(*codes.shape[:-1], BLOCK, device=codes.device), 0
        for stage in self.stages:
            parts = codes[..., first : first + stage.codebook.width].long().unbind(-1)
            code = sum(part << 8 * byte for byte, part in enumerate(parts))
            x = x + stage.factor * on_device(stage.codebook, codes.device)[code]
            first += stage.codebook.width
        return x


def blocks(in_features: int) -> int:
    """Vectors of a row; the last is filled up with zeros."""
    return -(-in_features // BLOCK)
