"""Kernels without thin factors: W' is made tile by tile, forward and backward, and never whole."""

from abc import abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nla.kernels.base import Kernel, Start, random_like
from nla.linalg import Spectrum, balanced_factors
from nla.triplets import Triplets, alternating_signs

TILE = 2**17  # numbers in a tile: 0.5 MiB in fp32, so that the handful of passes over it stay in a core's cache
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
        """Differentiable by autograd, which keeps every pair: a reference for small matrices."""
        return self.value(self.relate(t.A, t.B)) @ t.mu

    def apply(self, t: Triplets, x: Tensor) -> Tensor:
        return TileByTile.apply(self, x, t.A, t.B, t.mu)

    def rows(self, t: Triplets, row: slice) -> Tensor:
        """W'[row]: (rows, in), without a graph."""
        out = t.mu.new_zeros(row.stop - row.start, t.in_features)
        for block in blocks(t):
            out += self.value(self.relate(t.A[row, block], t.B[:, block])) @ t.mu[block]
        return out

    def add_gradient(self, t: Triplets, row: slice, d_rows: Tensor, into: Triplets) -> None:
        """Add the gradient of sum(W'[row] * d_rows) to `into`, evaluating each tile again."""
        for block in blocks(t):
            a, b, mu = t.A[row, block], t.B[:, block], t.mu[block]
            z = self.relate(a, b)
            k = self.value(z)
            into.mu[block] += d_rows.flatten() @ k.flatten(0, 1)
            d_z = self.slope(z, k)
            weight = d_rows[:, :, None] if d_z.ndim == 3 else d_rows[:, :, None, None]
            d_a, d_b = self.relate_gradient(d_z.mul_(weight), a, b)
            into.A[row, block] += d_a.mul_(mu[:, None])
            into.B[:, block] += d_b.mul_(mu[:, None])

    @torch.no_grad()
    def squared_error(self, t: Triplets, weight: Tensor, products: torch.dtype) -> tuple[Tensor, Triplets]:
        gradient, loss = t.map(torch.zeros_like), weight.new_zeros(())
        for row in tiles(t):
            error = self.rows(t, row) - weight[row]
            loss += error.square().sum()
            self.add_gradient(t, row, error.mul_(2), gradient)
        return loss, gradient

    def rank_bound(self, h: int, r: int) -> int | None:
        return None

    def forward_flops(self, out_features: int, in_features: int, h: int, r: int, tokens: int) -> int:
        return out_features * in_features * (PAIR_FLOPS * h * r + 2 * tokens)

    def fit_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        return 4 * PAIR_FLOPS * out_features * in_features * h * r


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

    def warm_start(self, weight: Tensor, spectrum: Spectrum, h: int, r: int, generator: torch.Generator) -> Start:
        return Start(random_like(self, weight, h, r, generator))


class ProductKernel(TiledKernel):
    """z = <A_il, B_jl>, (rows, in, h)."""

    small = 0.3  # root mean square of z at a warm start, where k is nearly k(0) + k'(0) z

    def relate(self, a: Tensor, b: Tensor) -> Tensor:
        return torch.einsum("ilk,jlk->ijl", a, b) if a.shape[2] > 1 else a[:, None, :, 0] * b[None, :, :, 0]

    def relate_gradient(self, d_z: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return torch.einsum("ijl,jlk->ilk", d_z, b), torch.einsum("ijl,ilk->jlk", d_z, a)

    def random_start(self, out_features: int, in_features: int, h: int, r: int, generator: torch.Generator) -> Triplets:
        A = torch.randn(out_features, h, r, generator=generator)
        B = torch.randn(in_features, h, r, generator=generator) / r**0.5
        return Triplets(A, B, alternating_signs(h, A) / h**0.5)

    def warm_start(self, weight: Tensor, spectrum: Spectrum, h: int, r: int, generator: torch.Generator) -> Start:
        """Truncated SVD in the range where k is nearly linear, with mu adding up to zero so that k(0) cancels.

        A single triplet cannot cancel it, and begins at random.
        """
        if h == 1:
            return Start(random_like(self, weight, h, r, generator))
        left, right = (f.unflatten(1, (h, r)) for f in balanced_factors(spectrum, h * r))
        signs = alternating_signs(h, left)
        size = torch.where(signs > 0, 1.0, (h + 1) // 2 / max(1, h // 2))
        zero = left.new_zeros(1, 1, 1)
        slope = float(self.slope(zero, self.value(zero)))
        shrink = self.small * (h * r) ** 0.5
        mu = signs * size / (slope * shrink)
        return Start(Triplets(left * shrink, right * (signs / size)[:, None], mu).map(lambda p: p.to(weight.dtype)))


def blocks(t: Triplets) -> Iterator[slice]:
    """Triplets taken together, so that one row of pairs is at most a tile (or one triplet)."""
    width = max(1, TILE // (t.in_features * t.r))
    return (slice(start, min(start + width, t.h)) for start in range(0, t.h, width))


def tiles(t: Triplets) -> Iterator[slice]:
    """Rows of W' taken together, so that a block of them is at most a tile (or one row)."""
    width = max(1, TILE // (t.in_features * t.r * max(t.h, 1)))
    return (slice(start, min(start + width, t.out_features)) for start in range(0, t.out_features, width))


class TileByTile(torch.autograd.Function):
    """x @ W'.T with one row block of W' alive at a time, evaluated again in the backward pass."""

    @staticmethod
    def forward(ctx, kernel, x, A, B, mu):  # type: ignore[no-untyped-def]
        ctx.kernel = kernel
        ctx.save_for_backward(x, A, B, mu)
        t, tokens = Triplets(A, B, mu), x.reshape(-1, x.shape[-1])
        y = x.new_empty(len(tokens), t.out_features)
        for row in tiles(t):
            y[:, row] = tokens @ kernel.rows(t, row).T
        return y.view(*x.shape[:-1], t.out_features)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):  # type: ignore[no-untyped-def]
        x, A, B, mu = ctx.saved_tensors
        t = Triplets(A, B, mu)
        gradient = t.map(torch.zeros_like)
        tokens, d_y = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, t.out_features)
        d_x = torch.zeros_like(tokens) if ctx.needs_input_grad[1] else None
        for row in tiles(t):
            if d_x is not None:
                d_x.addmm_(d_y[:, row], ctx.kernel.rows(t, row))
            ctx.kernel.add_gradient(t, row, d_y[:, row].T @ tokens, gradient)
        return None, None if d_x is None else d_x.view_as(x), gradient.A, gradient.B, gradient.mu
