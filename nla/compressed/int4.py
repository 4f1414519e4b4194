"""Grids of few bits for inference: the matrix stays in memory in codes of 4 bits, which torch's product unpacks in registers.

Milliseconds of one row in bf16 (one core of AMD Zen 5): 1536 x 576: 0.05, and 0.08 from a dense matrix; 4096 x 4096: 0.85 and
3.0. With 16 rows it takes 1.2 to 1.8 times as long as from a dense matrix, with 512 rows 2.6 times. Only bf16 on a CPU with
AVX-512 is so fast: in fp32 it takes 8 to 24 times as long as from a dense matrix for one row.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from nla.codes.packed import unpacked
from nla.compressed.inference_linear import InferenceLinear
from nla.terms.grid import Grid

GROUPS = (256, 128, 64, 32)  # that the product can read
ROWS = 16  # the number of outputs is a multiple of this
HALF = 8  # the product reads code c as c - 8


class Int4Linear(InferenceLinear):
    """y = x W^T + bias with W[i, j] = scale[g, i] * (code[i, j] - 8) + shift[g, i], where g = j // group.

    Args:
        codes: 0 .. 15, int32 (out, in).
        scales, shifts: (out, groups), of numbers that bfloat16 holds.
    """

    weight: Tensor
    scales_and_shifts: Tensor

    def __init__(self, codes: Tensor, scales: Tensor, shifts: Tensor, group: int, bias: Tensor | None) -> None:
        filling, rows = scales.shape[1] * group - codes.shape[1], -len(codes) % ROWS
        both = torch.stack((scales, shifts), -1).transpose(0, 1)  # (groups, out, 2)
        super().__init__(
            bias,
            weight=torch.ops.aten._convert_weight_to_int4pack_for_cpu(pad(codes, (0, filling, 0, rows)), 1),
            scales_and_shifts=pad(both, (0, 0, 0, rows)).to(torch.bfloat16).contiguous(),
        )
        self.out_features, self.in_features = codes.shape
        self.filling, self.group = filling, group

    def forward(self, x: Tensor) -> Tensor:
        tokens = pad(x.reshape(-1, self.in_features), (0, self.filling)).contiguous()  # (tokens, groups group)
        y = torch.ops.aten._weight_int4pack_mm_for_cpu(tokens, self.weight, self.group, self.scales_and_shifts)
        y = y[:, : self.out_features].view(*x.shape[:-1], self.out_features)
        return y if self.bias is None else y + self.bias


def is_fast(term: Grid) -> bool:
    """Whether an Int4Linear has the outputs of this term and is faster than the dense matrix (see the top of this file)."""
    if term.form.kind != "uniform" or term.form.width > 4 or not group_of(term):
        return False
    on_cpu = term.scales.device.type == "cpu" and torch.backends.cpu.get_cpu_capability() == "AVX512"
    return on_cpu and term.scales.dtype == torch.bfloat16


def group_of(term: Grid) -> int:
    """The group of the product: the grid's own, or one that wastes few bytes if a row is one group; 0: there is none."""
    if term.scales.shape[1] == 1:
        return min(GROUPS, key=lambda group: bits_of_row(term.in_features, group))
    return term.form.group if term.form.group in GROUPS else 0


def bits_of_row(in_features: int, group: int) -> int:
    """Bits of a row of in_features numbers: 4 for each code, and 32 for each group."""
    return -(-in_features // group) * (4 * group + 32)


def int4_linear(term: Grid, bias: Tensor | None) -> Int4Linear:
    """The layer of a grid for which `is_fast`. Up to 3 bits its matrix is the grid's, in 4 bits shifts are rounded to bf16.

    The value of a code is code - zero - 1/2. Up to 3 bits, code - zero is a code of the product, so that its shifts are
    halves of scales.
    """
    zeros, group, width = term.zero_points().int(), group_of(term), term.form.width
    codes = unpacked(term.codes, width, term.in_features).int()
    middles = zeros if width < 4 else torch.full_like(zeros, HALF)
    spread = middles.repeat_interleave(term.group_sizes(), 1)  # (out, in)
    scales = term.scales.detach()
    shifts = scales * (middles - zeros - 0.5)
    parts = 1 if term.scales.shape[1] > 1 else -(-term.in_features // group)  # groups of the product in one of the grid
    scales, shifts = (p.repeat_interleave(parts, 1) for p in (scales, shifts))
    return Int4Linear(codes - spread + HALF, scales, shifts, group, bias)
