"""The phase kernel: squared distances between points on the unit circle, stored as one angle each."""

import torch
from torch import Tensor

from nla.kernels.base import random_like
from nla.kernels.factored import FactoredKernel
from nla.matrix.objective import Objective
from nla.matrix.spectrum import mixed_factors, spectrum_flops
from nla.matrix.triplets import Triplets


class Phase(FactoredKernel):
    """W'[i, j] = sum_l mu_l sum_k cos(A_ilk - B_jlk). The rank is at most 2*h*r, twice that of a linear kernel of equal size.

    It is the piecewise kernel for points on the unit circle, up to a constant: |exp(ia) - exp(ib)|^2 = 2 - 2 cos(a - b).
    """

    training_rate = 1.5e-3  # below the default, because A and B are angles

    def entry(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).cos().sum(-1)

    def factors(self, t: Triplets) -> tuple[Tensor, Tensor]:
        A, B, mu = t.A.flatten(1), t.B.flatten(1), t.mu.repeat_interleave(t.r)
        return torch.cat((A.cos() * mu, A.sin() * mu), 1), torch.cat((B.cos(), B.sin()), 1)

    def features(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.stack((numbers.cos(), numbers.sin()), 1)
        return both, both

    def canonical(self, t: Triplets) -> Triplets:
        """The equivalent angles in [-pi, pi], because the rounding error of a bf16 number grows with its size."""
        return Triplets(wrap(t.A), wrap(t.B), t.mu)

    def columns(self, h: int, r: int) -> int:
        return 2 * h * r

    def random_start(self, out_features: int, in_features: int, h: int, r: int, generator: torch.Generator) -> Triplets:
        A = torch.rand(out_features, h, r, generator=generator).sub_(0.5).mul_(2 * torch.pi)
        B = torch.rand(in_features, h, r, generator=generator).sub_(0.5).mul_(2 * torch.pi)
        return Triplets(A, B, torch.full((h,), 0.3 * (2 / (h * r)) ** 0.5))

    def warm_start(self, objective: Objective, h: int, r: int, generator: torch.Generator) -> tuple[Triplets, float | None]:
        """Angles of complex vectors that consist of two consecutive singular vectors each.

        If their singular values are equal, u1 v1^T + u2 v2^T is |a_i| |b_j| cos(arg a_i - arg b_j) with a = u1 + i u2 and
        b = v1 + i v2. The angles are kept and the moduli are dropped. mu is the least-squares coefficient for these angles.
        """
        t = random_like(self, objective.weight, h, r, generator)
        left, s, right = objective.spectrum.truncated(2 * h * r)
        pairs = int((s > 0).sum()) // 2  # the other angles stay random
        A, B = t.A.flatten(1), t.B.flatten(1)
        A[:, :pairs] = torch.atan2(left[:, 1 : 2 * pairs : 2], left[:, 0 : 2 * pairs : 2])
        B[:, :pairs] = torch.atan2(right[:, 1 : 2 * pairs : 2], right[:, 0 : 2 * pairs : 2])
        angles = Triplets(A.unflatten(1, (h, r)), B.unflatten(1, (h, r)), torch.ones_like(t.mu))
        return Triplets(angles.A, angles.B, self.best_mu(angles, objective)), None

    def mixed_start(self, objective: Objective, h: int, r: int, generator: torch.Generator) -> Triplets:
        """Angles of pairs of columns of the truncated SVD's factors in a random basis, and the least-squares mu for them."""
        left, right = (f.to(objective.weight.dtype) for f in mixed_factors(objective.spectrum, 2 * h * r, generator))
        A, B = (torch.atan2(f[:, h * r :], f[:, : h * r]).unflatten(1, (h, r)) for f in (left, right))
        angles = Triplets(A, B, torch.ones_like(A[0, :, 0]))
        return Triplets(A, B, self.best_mu(angles, objective))

    def warm_start_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        return spectrum_flops(out_features, in_features)

    def best_mu(self, t: Triplets, objective: Objective) -> Tensor:
        """Least-squares mu (h,) for given angles, from the h x h normal equations (ridge 1e-3, in fp64)."""
        left, right = self.factors(t)
        left, right = left.double(), objective.weigh(right).double()
        # column (half, l, k) of the factors belongs to triplet l
        gram = ((left.T @ left) * (right.T @ right)).unflatten(0, (2, t.h, t.r)).unflatten(3, (2, t.h, t.r))
        normal = gram.sum((0, 2, 3, 5))
        moment = ((objective.target.double() @ right) * left).sum(0).unflatten(0, (2, t.h, t.r)).sum((0, 2))
        normal.diagonal().add_(1e-3 * normal.diagonal().mean())
        return torch.linalg.solve(normal, moment).to(t.mu.dtype)


def wrap(angle: Tensor) -> Tensor:
    """The equivalent angle in [-pi, pi]."""
    return angle - (angle / (2 * torch.pi)).round() * (2 * torch.pi)
