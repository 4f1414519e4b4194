"""The phase kernel: squared distances between points on the unit circle, stored as one angle each."""

import torch
from torch import Tensor

from nla.kernels.angles import AngleKernel, angles_of_pairs
from nla.kernels.base import random_like
from nla.matrix.objective import Objective
from nla.matrix.spectrum import mixed_factors
from nla.matrix.triplets import Triplets


class Phase(AngleKernel):
    """W'[i, j] = sum_l mu_l sum_k cos(A_ilk - B_jlk). The rank is at most 2*h*r, twice that of a linear kernel of equal size.

    It is the piecewise kernel for points on the unit circle, up to a constant: |exp(ia) - exp(ib)|^2 = 2 - 2 cos(a - b).
    """

    parts = 2
    training_rate = 1.5e-3  # below the default, because A and B are angles

    def entry(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).cos().sum(-1)

    def factors(self, t: Triplets) -> tuple[Tensor, Tensor]:
        A, B, mu = t.A.flatten(1), t.B.flatten(1), t.mu.repeat_interleave(t.r)
        return torch.cat((A.cos() * mu, A.sin() * mu), 1), torch.cat((B.cos(), B.sin()), 1)

    def features(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        both = torch.stack((numbers.cos(), numbers.sin()), 1)
        return both, both

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
        return self.with_best_mu(A.unflatten(1, (h, r)), B.unflatten(1, (h, r)), objective), None

    def mixed_start(self, objective: Objective, h: int, r: int, generator: torch.Generator) -> Triplets:
        """Angles of pairs of columns of the truncated SVD's factors in a random basis, and the least-squares mu for them."""
        mixed = (f.to(objective.weight.dtype) for f in mixed_factors(objective.spectrum, 2 * h * r, generator))
        A, B = (angles_of_pairs(f, h, r) for f in mixed)
        return self.with_best_mu(A, B, objective)
