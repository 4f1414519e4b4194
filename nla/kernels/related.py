"""Kernels of the difference or the inner product of two rows. Their handwritten gradients are faster than autograd's."""

from abc import abstractmethod

import torch
from torch import Tensor

from nla.kernels.base import Kernel, random_like
from nla.matrix.objective import Objective
from nla.matrix.spectrum import balanced_factors, spectrum_flops
from nla.matrix.triplets import Triplets, alternating_signs


class RelatedKernel(Kernel):
    """A kernel k(a, b) = value(z), where z is the difference or the inner product of a and b.

    `value` computes the formula of `entry` and `slope` its derivative; both are written for speed.
    """

    @abstractmethod
    def relate(self, a: Tensor, b: Tensor) -> Tensor:
        """z of all pairs of rows: (rows, h, r), (in, h, r) -> (rows, in, h, ...)."""

    @abstractmethod
    def relate_gradient(self, d_z: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients with respect to a and b, given d_z, the gradient with respect to z. May overwrite d_z."""

    @abstractmethod
    def value(self, z: Tensor) -> Tensor:
        """k(z): (rows, in, h, ...) -> (rows, in, h)."""

    @abstractmethod
    def slope(self, z: Tensor, k: Tensor) -> Tensor:
        """dk/dz in the shape of z, given k = value(z). May overwrite z."""

    def pairs(self, a: Tensor, b: Tensor) -> Tensor:
        return self.value(self.relate(a, b))

    @torch.no_grad()
    def pairs_gradient(self, a: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        z = self.relate(a, b)
        k = self.value(z)
        d_z = self.slope(z, k)
        d_z.mul_(d[:, :, None] if d_z.ndim == 3 else d[:, :, None, None])
        return k, *self.relate_gradient(d_z, a, b)


class DifferenceKernel(RelatedKernel):
    """z = A_il - B_jl, (rows, in, h, r). Its fits start at random, because singular vectors give it no useful start."""

    spread = 2.0  # standard deviation of A and B at the start, times sqrt(r); a fit increases it

    def relate(self, a: Tensor, b: Tensor) -> Tensor:
        return a[:, None] - b[None]

    def relate_gradient(self, d_z: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        return d_z.sum(1), d_z.sum(0).neg_()

    def random_start(self, out_features: int, in_features: int, h: int, r: int, generator: torch.Generator) -> Triplets:
        spread = self.spread / r**0.5
        A = spread * torch.randn(out_features, h, r, generator=generator)
        B = spread * torch.randn(in_features, h, r, generator=generator)
        return Triplets(A, B, alternating_signs(h, A) * 0.5)


class ProductKernel(RelatedKernel):
    """z = <A_il, B_jl>, (rows, in, h)."""

    small = 0.3  # root mean square of z in a warm start, small enough for k(z) to be nearly k(0) + k'(0) z

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

    def warm_start(self, objective: Objective, h: int, r: int, generator: torch.Generator) -> tuple[Triplets, float | None]:
        """Truncated SVD, scaled to the range of z where k is nearly linear. mu sums to zero, so that k(0) cancels.

        With h = 1, k(0) cannot cancel, and the start is random.
        """
        if h == 1:
            return random_like(self, objective.weight, h, r, generator), None
        left, right = (f.unflatten(1, (h, r)) for f in balanced_factors(objective.spectrum, h * r))
        signs = alternating_signs(h, left)
        size = torch.where(signs > 0, 1.0, (h + 1) // 2 / max(1, h // 2))
        zero = left.new_zeros(1, 1, 1)
        slope = float(self.slope(zero, self.value(zero)))
        shrink = self.small * (h * r) ** 0.5
        mu = signs * size / (slope * shrink)
        t = Triplets(left * shrink, right * (signs / size)[:, None], mu)
        return t.map(lambda p: p.to(objective.weight.dtype)), None

    def warm_start_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        return spectrum_flops(out_features, in_features)
