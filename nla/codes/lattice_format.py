"""Rows of vectors of eight numbers in 1 to 4 bits a number: entries of lattice codebooks, and their codes as bytes."""

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


# For each width, the factors with the smallest mean |nearest(x) - x|^2 for Gaussian numbers x of variance 1, found on a grid.
TWO, ONE = E8P(), E8Shell()
STAGES = {
    0: (),  # the vector of zeros
    1: (Stage(ONE, 1.64),),
    2: (Stage(TWO, 0.96),),
    3: (Stage(TWO, 1.02), Stage(ONE, 1.02 * 0.49)),
    4: (Stage(TWO, 1.12), Stage(TWO, 1.12 * 0.26)),
}


@dataclass(frozen=True)
class VectorFormat:
    """The sum of one entry for each stage (residual quantisation, QuIP#).

    Attributes:
        width: bits of a number, which are also the bytes of a vector: one of WIDTHS, or 0 for zeros.
    """

    width: int

    @cached_property
    def stages(self) -> tuple[Stage, ...]:
        return STAGES[self.width]

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


@dataclass(frozen=True)
class RowFormat:
    """A row of vectors. The last ones take one bit a number more than the first ones, so that a row has any number of bytes.

    Attributes:
        vectors: number of vectors, at least 1.
        size: bytes of a row, at most 4 vectors; 0: all vectors are zeros.
    """

    vectors: int
    size: int

    @cached_property
    def parts(self) -> list[tuple[VectorFormat, int]]:
        """The format and the number of the narrow vectors, then of the wide ones. One of the two may be missing."""
        width, wide = divmod(self.size, self.vectors)
        counts = {width: self.vectors - wide, width + 1: wide}
        return [(VectorFormat(bits), count) for bits, count in counts.items() if count]

    def vector(self, number: int) -> tuple[VectorFormat, slice]:
        """The format of a vector, and its bytes in a row."""
        width, wide = divmod(self.size, self.vectors)
        further = max(0, number - (self.vectors - wide))  # wide vectors before it
        begin, form = number * width + further, VectorFormat(width + (number >= self.vectors - wide))
        return form, slice(begin, begin + form.width)

    def values(self, codes: Tensor) -> Tensor:
        """The rows (rows, 8 vectors), fp32, of codes (rows, size)."""
        found, first = [], 0
        for form, count in self.parts:
            part = codes[:, first : first + count * form.width].unflatten(1, (count, form.width))
            found.append(form.values(part).flatten(1))
            first += count * form.width
        return torch.cat(found, 1)


def blocks(in_features: int) -> int:
    """Vectors of a row; the last is filled up with zeros."""
    return -(-in_features // BLOCK)
