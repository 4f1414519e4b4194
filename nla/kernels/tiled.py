"""Forward and backward pass of any kernel, tile by tile, so that the whole matrix W' is never in memory."""

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nla.matrix.parts import PANEL, TILE, slices, widen
from nla.matrix.triplets import Triplets


class PairKernel(Protocol):
    """The part of a kernel that tiles are made with (see `nla.kernels.base.Kernel`)."""

    def pairs(self, a: Tensor, b: Tensor) -> Tensor: ...

    def pairs_gradient(self, a: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]: ...


def matrix_rows(kernel: PairKernel, t: Triplets, panel: slice) -> Tensor:
    """The rows W'[panel] (rows, in). Triplets in bf16 are evaluated in fp32, because terms of opposite signs cancel."""
    parts, dtype = [], t.mu.dtype
    t = t.map(widen)
    for row, blocks in tiles(t, panel):
        values = (kernel.pairs(t.A[row, block], t.B[:, block]) @ t.mu[block] for block in blocks)
        parts.append(sum(values, t.mu.new_zeros(row.stop - row.start, t.in_features)))
    return torch.cat(parts).to(dtype)


def add_gradient(kernel: PairKernel, t: Triplets, panel: slice, d_panel: Tensor, into: Triplets) -> None:
    """Add the gradient of sum(W'[panel] * d_panel) with respect to the triplets to `into`. Each tile is evaluated again."""
    t, d_panel = t.map(widen), widen(d_panel)
    for row, blocks in tiles(t, panel):
        d_rows = d_panel[row.start - panel.start : row.stop - panel.start]
        for block in blocks:
            k, d_a, d_b = kernel.pairs_gradient(t.A[row, block], t.B[:, block], d_rows)
            mu = t.mu[block]
            into.mu[block] += d_rows.flatten() @ k.flatten(0, 1)
            into.A[row, block] += d_a.mul_(mu[:, None])
            into.B[:, block] += d_b.mul_(mu[:, None])


class TileByTile(torch.autograd.Function):
    """x @ W'.T with one panel of W' in memory at a time. The backward pass evaluates each panel again."""

    @staticmethod
    def forward(ctx, kernel, x, A, B, mu):  # type: ignore[no-untyped-def]
        ctx.kernel = kernel
        ctx.save_for_backward(x, A, B, mu)
        t, tokens = Triplets(A, B, mu), x.reshape(-1, x.shape[-1])
        y = x.new_empty(len(tokens), t.out_features)
        for panel in panels(t):
            y[:, panel] = tokens @ matrix_rows(kernel, t, panel).T
        return y.view(*x.shape[:-1], t.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):  # type: ignore[no-untyped-def]
        x, A, B, mu = ctx.saved_tensors
        t = Triplets(A, B, mu)
        gradient = t.map(lambda p: torch.zeros_like(widen(p)))  # wide, because many small numbers are summed
        tokens, d_y = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, t.out_features)
        d_x = torch.zeros_like(tokens) if ctx.needs_input_grad[1] else None
        for panel in panels(t):
            if d_x is not None:
                d_x.addmm_(d_y[:, panel], matrix_rows(ctx.kernel, t, panel))
            add_gradient(ctx.kernel, t, panel, d_y[:, panel].T @ tokens, gradient)
        gradient = gradient.map(lambda p: p.to(x.dtype))
        return None, None if d_x is None else d_x.view_as(x), gradient.A, gradient.B, gradient.mu


def panels(t: Triplets) -> Iterator[slice]:
    """Slices of the rows of W'. Each slice, a panel, is in memory as a whole."""
    return slices(t.out_features, PANEL // t.in_features)


def tiles(t: Triplets, panel: slice) -> Iterator[tuple[slice, list[slice]]]:
    """(rows, blocks of triplets) of a panel, with rows x in x triplets x r <= TILE, or one row and one triplet at a time."""
    tile, pairs = TILE[t.A.device.type], t.in_features * t.r
    blocks = list(slices(t.h, tile // pairs))
    for row in slices(panel.stop - panel.start, tile // (pairs * max(t.h, 1))):
        yield slice(panel.start + row.start, panel.start + row.stop), blocks
