"""What kernels have in common whose numbers are angles."""

import torch
from torch import Tensor

from nla.kernels.factored import FactoredKernel
from nla.matrix.objective import Objective
from nla.matrix.spectrum import spectrum_flops
from nla.matrix.triplets import Triplets

RIDGE = 1e-3  # of the least squares for mu, as a fraction of the mean of the diagonal


class AngleKernel(FactoredKernel):
    """A kernel that is a function of A_il - B_jl with period 2 pi.

    Attributes:
        parts: features of a number: `factors` gives `parts` blocks of h r columns each.
    """

    parts: int

    def columns(self, h: int, r: int) -> int:
        return self.parts * h * r

    def canonical(self, t: Triplets) -> Triplets:
        """The equivalent angles in [-pi, pi], because the rounding error of a bf16 number grows with its size."""
        return Triplets(wrap(t.A), wrap(t.B), t.mu)

    def random_start(self, out_features: int, in_features: int, h: int, r: int, generator: torch.Generator) -> Triplets:
        A = torch.rand(out_features, h, r, generator=generator).sub_(0.5).mul_(2 * torch.pi)
        B = torch.rand(in_features, h, r, generator=generator).sub_(0.5).mul_(2 * torch.pi)
        return Triplets(A, B, torch.full((h,), 0.3 * (2 / (h * r)) ** 0.5))

    def warm_start_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        return spectrum_flops(out_features, in_features)

    def with_best_mu(self, A: Tensor, B: Tensor, objective: Objective) -> Triplets:
        """The angles A (out, h, r) and B (in, h, r) with the least-squares mu, from the h x h normal equations in fp64."""
        t = Triplets(A, B, torch.ones_like(A[0, :, 0]))
        left, right = self.factors(t)
        left, right = left.double(), objective.weigh(right).double()
        # column (part, l, k) of the factors belongs to triplet l
        shape = (self.parts, t.h, t.r)
        gram = ((left.T @ left) * (right.T @ right)).unflatten(0, shape).unflatten(3, shape)
        normal = gram.sum((0, 2, 3, 5))
        moment = ((objective.target.double() @ right) * left).sum(0).unflatten(0, shape).sum((0, 2))
        normal.diagonal().add_(RIDGE * normal.diagonal().mean())
        return Triplets(A, B, torch.linalg.solve(normal, moment).to(A.dtype))


def wrap(angle: Tensor) -> Tensor:
    """The equivalent angle in [-pi, pi]."""
    return angle - (angle / (2 * torch.pi)).round() * (2 * torch.pi)


def angles_of_pairs(columns: Tensor, h: int, r: int) -> Tensor:
    """Angles (n, h, r) of the points (x, y), where x are the first h r of 2 h r columns and y the others."""
    return torch.atan2(columns[:, h * r :], columns[:, : h * r]).unflatten(1, (h, r))
