"""A matrix in 1 to 4 bits a number, on average: codes of lattice points, between two random rotations (QuIP#)."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from nla.codes.hadamard import random_signs, rotated, rotated_back, rotation_flops
from nla.codes.lattice_format import BLOCK, WIDTHS, RowFormat, blocks
from nla.machine.device import type_name
from nla.matrix.parts import PANEL, slices, widen
from nla.terms.base import Stored, Term, class_path

SEED_BITS = 64


class LatticeTerm(Term):
    """W' = scale U^T Q V: each 8 numbers of a row of Q (out, 8 blocks) are a vector of the format's codebooks.

    U (out, out) and V (8 blocks, 8 blocks) are random Hadamard transforms (`nla.codes.hadamard`). Rows of W' are filled up
    with zeros to a multiple of eight numbers, which is what V rotates. Source: Tseng et al., "QuIP#", ICML 2024.

    Args:
        codes: uint8 (out, bytes), see `RowFormat`. No bytes: the matrix is zero.
        scale: ().
        seed: int64 (), of the signs of U and V.
        in_features: inputs, which blocks do not tell.
    """

    codes: Tensor
    seed: Tensor

    def __init__(self, codes: Tensor, scale: Tensor, seed: Tensor, in_features: int) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("seed", seed)
        self.scale = nn.Parameter(scale.detach())
        self.out_features, self.in_features = len(codes), in_features

    @classmethod
    def empty(cls, out_features: int, in_features: int, size: int, dtype: torch.dtype) -> "LatticeTerm":  # type: ignore[override]
        codes = torch.empty(out_features, size, dtype=torch.uint8, device="meta")
        scale, seed = (torch.empty((), dtype=kind, device="meta") for kind in (dtype, torch.int64))
        return cls(codes, scale, seed, in_features)

    @property
    def size(self) -> int:
        """Bytes of a row."""
        return self.codes.shape[1]

    @property
    def filling(self) -> int:
        """Zeros that fill up a row."""
        return -self.in_features % BLOCK

    def signs(self) -> list[Tensor]:
        """The signs of U (out,) and V (8 blocks,), fp32."""
        return rotations(int(self.seed), self.out_features, self.in_features, self.codes.device)

    def rows(self, panel: slice, dtype: torch.dtype) -> Tensor:
        """The rows Q[panel] (rows, 8 blocks)."""
        return RowFormat(blocks(self.in_features), self.size).values(self.codes[panel]).to(dtype)

    def product(self, x: Tensor, panel: slice) -> Tensor:
        """x @ Q[panel].T: (..., 8 blocks) -> (..., rows)"""
        return x @ self.rows(panel, x.dtype).T

    def forward(self, x: Tensor) -> Tensor:
        """Computes in fp32 at least. The backward pass decodes each panel of rows again, so that only one is in memory."""
        left, right = self.signs()
        inner = rotated(pad(widen(x), (0, self.filling)), right)
        product = self.product
        if torch.is_grad_enabled():
            product = partial(checkpoint, self.product, use_reentrant=False, preserve_rng_state=False)
        panels = slices(self.out_features, PANEL // inner.shape[-1])
        y = torch.cat([product(inner, panel) for panel in panels], -1)
        return (rotated_back(y, left) * widen(self.scale)).to(x.dtype)

    def dense(self) -> Tensor:
        (left, right), scale = self.signs(), widen(self.scale)
        Q = self.rows(slice(0, self.out_features), scale.dtype)
        W = rotated_back(rotated_back(Q, right).T, left).T  # U^T Q V
        return (W[:, : self.in_features] * scale).to(self.scale.dtype)

    def stored(self) -> list[Stored]:
        if not self.size:
            return []  # the matrix is zero
        return [
            Stored(self.codes, self.out_features * self.in_features, 8 * self.codes.numel()),
            Stored(self.scale, 1, 8 * self.scale.element_size()),
            Stored(self.seed, 0, SEED_BITS),
        ]

    def config(self) -> dict[str, Any]:
        return {
            "class": class_path(self),
            "out_features": self.out_features,
            "in_features": self.in_features,
            "size": self.size,
            "dtype": type_name(self.scale),
        }

    def describe(self) -> str:
        return f"e8 bits={self.size / blocks(self.in_features):.3g}"

    def forward_flops(self, tokens: int) -> int:
        m, n = self.out_features, BLOCK * blocks(self.in_features)
        return m * n + tokens * (2 * m * n + rotation_flops(m) + rotation_flops(n) + m)

    def dense_flops(self) -> int:
        m, n = self.out_features, BLOCK * blocks(self.in_features)
        return m * n + m * rotation_flops(n) + n * rotation_flops(m) + m * self.in_features

    def scaled(self, factor: float) -> "LatticeTerm":
        return LatticeTerm(self.codes, self.scale * factor, self.seed, self.in_features)

    def as_stored(self, dtype: torch.dtype) -> "LatticeTerm":
        return LatticeTerm(self.codes, self.scale.to(dtype), self.seed, self.in_features)

    def trainable(self) -> Term:
        from nla.terms.unpacked import UnpackedLattice

        return UnpackedLattice(self)


def rotations(seed: int, out_features: int, in_features: int, device: torch.device) -> list[Tensor]:
    """The signs of U (out,) and V (8 blocks,), fp32."""
    return [signs.to(device) for signs in random_signs(seed, out_features, BLOCK * blocks(in_features))]


def lattice_bits(out_features: int, size: int, dtype: torch.dtype) -> int:
    """Bits of a term with rows of `size` bytes: codes, the scale in this type, and the seed."""
    return 8 * out_features * size + 8 * dtype.itemsize + SEED_BITS


def largest_size(out_features: int, in_features: int, bits: int, dtype: torch.dtype) -> int:
    """Bytes of a row of the largest term with so many bits: 1 to 4 for each vector, or 0 if one is too much."""
    vectors, size = blocks(in_features), (bits - lattice_bits(out_features, 0, dtype)) // (8 * out_features)
    return min(size, max(WIDTHS) * vectors) if size >= min(WIDTHS) * vectors else 0
