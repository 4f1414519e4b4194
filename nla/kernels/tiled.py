"""Kernels without thin factors: W' is made tile by tile, forward and backward, and never whole."""

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nla.kernels.base import Kernel, Start, random_like
from nla.matrix.objective import Objective
from nla.matrix.spectrum import balanced_factors
from nla.matrix.triplets import Triplets, alternating_signs

PANEL = 2**19  # numbers of W' held at once, enough rows for a full-speed matrix product
TILE = {"cpu": 2**17, "cuda": 2**25}  # numbers z evaluated at once: a core's cache (0.5 MiB in fp32), a GPU's launch overhead
PAIR_FLOPS = 8  # an evaluation of k costs about this many operations per pair and column


class TiledKernel(Kernel):
    """W'[i, j] = sum_l mu_l k(z_ijl), where z relates A_il and B_jl: a difference or an inner product."""

    exact_apply = False

    @abstractmethod
    def relate(self, a: Tensor, b: Tensor) -> Tensor:
        """z of all pairs: (rows, h, r), (in, h, r) -> (rows, in, h, ...)."""

    @abstractmethod
    def relate_gradient(self, d_z: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient for a and b, given that for z; may overwrite d_z."""

    @abstractmethod
    def value(self, z: Tensor) -> Tensor:
        """k(z): (rows, in, h, ...) -> (rows, in, h)."""

    @abstractmethod
    def slope(self, z: Tensor, k: Tensor) -> Tensor:
        """dk/dz, of the shape of z, given k = value(z); may overwrite z."""

    def dense(self, t: Triplets) -> Tensor:
        return torch.cat([self.rows(t, panel) for panel in panels(t)])

    def apply(self, t: Triplets, x: Tensor) -> Tensor:
        return TileByTile.apply(self, x, t.A, t.B, t.mu)

    def rows(self, t: Triplets, panel: slice) -> Tensor:
        """W'[panel]: (rows, in), evaluated in fp32 where triplets are bf16, for terms of opposite signs cancel."""
        parts, dtype = [], t.mu.dtype
        t = t.map(widen)
        for row, blocks in tiles(t, panel):
            values = (self.value(self.relate(t.A[row, block], t.B[:, block])) @ t.mu[block] for block in blocks)
            parts.append(sum(values, t.mu.new_zeros(row.stop - row.start, t.in_features)))
        return torch.cat(parts).to(dtype)

    def add_gradient(self, t: Triplets, panel: slice, d_panel: Tensor, into: Triplets) -> None:
        """Add the gradient of sum(W'[panel] * d_panel) to `into`, evaluating each tile again."""
        t, d_panel = t.map(widen), widen(d_panel)
        for row, blocks in tiles(t, panel):
            d_rows = d_panel[row.start - panel.start : row.stop - panel.start]
            for block in blocks:
                a, b, mu = t.A[row, block], t.B[:, block], t.mu[block]
                z = self.relate(a, b)
                k = self.value(z)
                into.mu[block] += d_rows.flatten() @ k.flatten(0, 1)
                d_z = self.slope(z, k)
                d_z.mul_(d_rows[:, :, None] if d_z.ndim == 3 else d_rows[:, :, None, None])
                d_a, d_b = self.relate_gradient(d_z, a, b)
                into.A[row, block] += d_a.mul_(mu[:, None])
                into.B[:, block] += d_b.mul_(mu[:, None])

    @torch.no_grad()
    def squared_error(self, t: Triplets, objective: Objective, products: torch.dtype) -> tuple[Tensor, Triplets]:
        gradient, loss = t.map(torch.zeros_like), objective.weight.new_zeros(())
        for panel in panels(t):
            part, d_panel = objective.squared(self.rows(t, panel) - objective.weight[panel])
            loss += part
            self.add_gradient(t, panel, d_panel, gradient)
        return loss, gradient

    def rank_bound(self, h: int, r: int) -> int | None:
        return None

    def forward_flops(self, out_features: int, in_features: int, h: int, r: int, tokens: int) -> int:
        return out_features * in_features * (PAIR_FLOPS * h * r + 2 * tokens)

    def fit_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        return 4 * PAIR_FLOPS * out_features * in_features * h * r

    def weighting_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        return 2 * out_features * in_features * in_features


class DifferenceKernel(TiledKernel):
    """z = A_il - B_jl, (rows, in, h, r). Its fits begin at random: no singular vectors make a useful start for it."""

    spread = 2.0  # standard deviation of the coordinates at the start; a fit spreads them out further

    def relate(self, a: Tensor, b: Tensor) -> Tensor:
        return a[:, None] - b[None]

    def relate_gradient(self, d_z: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return d_z.sum(1), d_z.sum(0).neg_()

    def warm_start_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        return 0

    def random_start(self, out_features: int, in_features: int, h: int, r: int, generator: torch.Generator) -> Triplets:
        spread = self.spread / r**0.5
        A = spread * torch.randn(out_features, h, r, generator=generator)
        B = spread * torch.randn(in_features, h, r, generator=generator)
        return Triplets(A, B, alternating_signs(h, A) * 0.5)

    def warm_start(self, objective: Objective, h: int, r: int, generator: torch.Generator) -> Start:
        return Start(random_like(self, objective.weight, h, r, generator))


class ProductKernel(TiledKernel):
    """z = <A_il, B_jl>, (rows, in, h)."""

    small = 0.3  # root mean square of z at a warm start, where k is nearly k(0) + k'(0) z

    def relate(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("ilk,jlk->ijl", a, b) if a.shape[2] > 1 else a[:, None, :, 0] * b[None, :, :, 0]

    def relate_gradient(self, d_z: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        if a.shape[2] > 1:
            return torch.einsum("ijl,jlk->ilk", d_z, b), torch.einsum("ijl,ilk->jlk", d_z, a)
        d_a, d_b = (d_z * b[None, :, :, 0]).sum(1), (d_z * a[:, None, :, 0]).sum(0)
        return d_a[:, :, None], d_b[:, :, None]

    def random_start(self, out_features: int, in_features: int, h: int, r: int, generator: torch.Generator) -> Triplets:
        A = torch.randn(out_features, h, r, generator=generator)
        B = torch.randn(in_features, h, r, generator=generator) / r**0.5
        return Triplets(A, B, alternating_signs(h, A) / h**0.5)

    def warm_start(self, objective: Objective, h: int, r: int, generator: torch.Generator) -> Start:
        """Truncated SVD in the range where k is nearly linear, with mu adding up to zero so that k(0) cancels.

        A single triplet cannot cancel it, and begins at random.
        """
        if h == 1:
            return Start(random_like(self, objective.weight, h, r, generator))
        left, right = (f.unflatten(1, (h, r)) for f in balanced_factors(objective.spectrum, h * r))
        signs = alternating_signs(h, left)
        size = torch.where(signs > 0, 1.0, (h + 1) // 2 / max(1, h // 2))
        zero = left.new_zeros(1, 1, 1)
        slope = float(self.slope(zero, self.value(zero)))
        shrink = self.small * (h * r) ** 0.5
        mu = signs * size / (slope * shrink)
        return Start(Triplets(left * shrink, right * (signs / size)[:, None], mu).map(lambda p: p.to(objective.weight.dtype)))


def panels(t: Triplets) -> Iterator[slice]:
    """Rows of W' that are held together."""
    return slices(t.out_features, PANEL // t.in_features)


def tiles(t: Triplets, panel: slice) -> Iterator[tuple[slice, list[slice]]]:
    """(rows, blocks of triplets) inside a panel; rows x in x triplets x r is at most a tile, or one row of one triplet."""
    tile, pairs = TILE[t.A.device.type], t.in_features * t.r
    blocks = list(slices(t.h, tile // pairs))
    for row in slices(panel.stop - panel.start, tile // (pairs * max(t.h, 1))):
        yield slice(panel.start + row.start, panel.start + row.stop), blocks


def slices(total: int, width: int) -> Iterator[slice]:
    """range(total) cut into slices of this width, or of 1."""
    width = max(1, width)
    return (slice(start, min(start + width, total)) for start in range(0, total, width))


def widen(p: Tensor) -> Tensor:
    """The same numbers in at least fp32."""
    return p.to(torch.promote_types(p.dtype, torch.float32))


class TileByTile(torch.autograd.Function):
    """x @ W'.T with one panel of W' alive at a time, evaluated again in the backward pass."""

    @staticmethod
    def forward(ctx, kernel, x, A, B, mu):  # type: ignore[no-untyped-def]
        ctx.kernel = kernel
        ctx.save_for_backward(x, A, B, mu)
        t, tokens = Triplets(A, B, mu), x.reshape(-1, x.shape[-1])
        y = x.new_empty(len(tokens), t.out_features)
        for panel in panels(t):
            y[:, panel] = tokens @ kernel.rows(t, panel).T
        return y.view(*x.shape[:-1], t.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):  # type: ignore[no-untyped-def]
        x, A, B, mu = ctx.saved_tensors
        t = Triplets(A, B, mu)
        gradient = t.map(lambda p: torch.zeros_like(widen(p)))  # many small ones are added up
        tokens, d_y = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, t.out_features)
        d_x = torch.zeros_like(tokens) if ctx.needs_input_grad[1] else None
        for panel in panels(t):
            if d_x is not None:
                d_x.addmm_(d_y[:, panel], ctx.kernel.rows(t, panel))
            ctx.kernel.add_gradient(t, panel, d_y[:, panel].T @ tokens, gradient)
        gradient = gradient.map(lambda p: p.to(x.dtype))
        return None, None if d_x is None else d_x.view_as(x), gradient.A, gradient.B, gradient.mu
