"""A matrix in few bits: codes on a grid, with a scale and a zero point for each group of inputs of a row."""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from torch.utils.checkpoint import checkpoint

from nla.codes.grid_format import SCALE_BITS, GridFormat
from nla.codes.packed import packed, packed_width, unpacked
from nla.codes.rounding import Rounded
from nla.machine.device import type_name
from nla.matrix.parts import PANEL, slices, widen
from nla.terms.base import Stored, Term, class_path


class Grid(Term):
    """W'[i, j] = scale[i, g] * value(code[i, j], zero[i, g]), where g = j // group is the group of input j.

    The values of codes are those of the format's levels: code - zero - 1/2 (`Uniform`), or a table (`NormalFloat`).

    Scales are trainable numbers of the model's type. `as_stored` rounds them to numbers of bfloat16, which has the range of
    fp32, so that they take 16 bits in a model of any type. Scales that training changed count in their own type.

    Args:
        codes: packed codes, uint8 (out, bytes of a row).
        zeros: packed zero points of all groups, uint8 (1, bytes); no bytes if the levels have none.
        scales: (out, groups).
        in_features: inputs, which packed codes do not tell.
    """

    codes: Tensor
    zeros: Tensor

    def __init__(self, codes: Tensor, zeros: Tensor, scales: Tensor, in_features: int, form: GridFormat) -> None:
        super().__init__()
        self.register_buffer("codes", codes)
        self.register_buffer("zeros", zeros)
        self.scales = nn.Parameter(scales.detach())
        self.out_features, self.in_features, self.form = len(codes), in_features, form

    @classmethod
    def empty(  # type: ignore[override]
        cls, out_features: int, in_features: int, width: int, group: int, levels: str, dtype: torch.dtype
    ) -> "Grid":
        form = GridFormat(width, group, levels)
        codes = torch.empty(out_features, packed_width(in_features, width), dtype=torch.uint8, device="meta")
        zeros = torch.empty(1, form.zero_bytes(out_features, in_features), dtype=torch.uint8, device="meta")
        scales = torch.empty(out_features, form.groups(in_features), dtype=dtype, device="meta")
        return cls(codes, zeros, scales, in_features, form)

    def rows(self, panel: slice, zeros: Tensor) -> Tensor:
        """The rows W'[panel] (rows, in), computed in fp32, in the type of the scales. Zeros: the `zero_points`."""
        groups, group, n = self.scales.shape[1], self.form.group, self.in_features
        codes = pad(unpacked(self.codes[panel], self.form.width, n), (0, groups * group - n)).unflatten(1, (groups, group))
        values = self.form.levels.values(codes, zeros[panel, :, None]) * widen(self.scales[panel, :, None])
        return values.to(self.scales.dtype).flatten(1)[:, :n]

    def zero_points(self) -> Tensor:
        """The zero points (out, groups), uint8; zeros if the levels have none."""
        shape = self.scales.shape
        if not self.form.levels.has_zeros:
            return torch.zeros(shape, dtype=torch.uint8, device=self.codes.device)
        return unpacked(self.zeros, self.form.width, shape.numel()).view(shape)

    def group_sizes(self) -> Tensor:
        """The number of inputs of each group (groups,)."""
        groups, group = self.scales.shape[1], self.form.group
        sizes = torch.full((groups,), group, device=self.codes.device)
        sizes[-1] = self.in_features - (groups - 1) * group
        return sizes

    def product(self, x: Tensor, panel: slice, zeros: Tensor) -> Tensor:
        """x @ W'[panel].T: (..., in) -> (..., rows)"""
        return x @ self.rows(panel, zeros).to(x.dtype).T

    def forward(self, x: Tensor) -> Tensor:
        """The backward pass computes each panel of rows again, so that no more than one is in memory."""
        product, zeros = self.product, self.zero_points()
        if torch.is_grad_enabled():
            product = partial(checkpoint, self.product, use_reentrant=False, preserve_rng_state=False)
        return torch.cat([product(x, panel, zeros) for panel in slices(self.out_features, PANEL // self.in_features)], -1)

    def dense(self) -> Tensor:
        return self.rows(slice(0, self.out_features), self.zero_points())

    def stored(self) -> list[Stored]:
        scales, groups = self.scales, self.scales.numel()
        exact = scales.is_meta or torch.equal(scales.to(torch.bfloat16).to(scales.dtype), scales)
        return [
            Stored(self.codes, self.out_features * self.in_features, 8 * self.codes.numel()),
            Stored(self.zeros, groups if self.form.levels.has_zeros else 0, 8 * self.zeros.numel()),
            Stored(scales, groups, (SCALE_BITS if exact else 8 * scales.element_size()) * groups),
        ]

    def config(self) -> dict[str, Any]:
        return {
            "class": class_path(self),
            "out_features": self.out_features,
            "in_features": self.in_features,
            "width": self.form.width,
            "group": self.form.group,
            "levels": self.form.kind,
            "dtype": type_name(self.scales),
        }

    def describe(self) -> str:
        return self.form.describe()

    def forward_flops(self, tokens: int) -> int:
        return self.dense_flops() + 2 * tokens * self.out_features * self.in_features

    def dense_flops(self) -> int:
        return 2 * self.out_features * self.in_features

    def scaled(self, factor: float) -> "Grid":
        return Grid(self.codes, self.zeros, self.scales * factor, self.in_features, self.form)

    def as_stored(self, dtype: torch.dtype) -> "Grid":
        return Grid(self.codes, self.zeros, self.scales.to(torch.bfloat16).to(dtype), self.in_features, self.form)

    def trainable(self) -> Term:
        from nla.terms.unpacked import UnpackedGrid

        return UnpackedGrid(self)


def grid(codes: Tensor, zeros: Tensor, scales: Tensor, form: GridFormat) -> Grid:
    """The term of these codes (out, in), zero points and scales (out, groups), which are numbers of any type."""
    kept = zeros.reshape(1, -1) if form.levels.has_zeros else zeros.new_zeros(1, 0)
    return Grid(packed(codes, form.width), packed(kept, form.width), scales, codes.shape[1], form)


def grid_of(rounded: Rounded, form: GridFormat) -> Grid:
    """The term of a rounded matrix."""
    return grid(rounded.codes, rounded.scaling.zeros, rounded.scaling.scales, form)
