"""The linear kernel: truncated SVD, and every baseline that is a product of two factors."""

import torch
from torch import Tensor

from nla.kernels.base import FactoredKernel, Start
from nla.linalg import balanced_factors
from nla.objective import Objective
from nla.triplets import Triplets


class Linear(FactoredKernel):
    """W'[i, j] = sum_l mu_l <A_il, B_jl>. Rank at most h*r."""

    def factors(self, t: Triplets) -> tuple[Tensor, Tensor]:
        return (t.A * t.mu[:, None]).flatten(1), t.B.flatten(1)

    def columns(self, h: int, r: int) -> int:
        return h * r

    def random_start(self, out_features: int, in_features: int, h: int, r: int, generator: torch.Generator) -> Triplets:
        scale = (h * r) ** -0.25
        A = scale * torch.randn(out_features, h, r, generator=generator)
        B = scale * torch.randn(in_features, h, r, generator=generator)
        return Triplets(A, B, torch.ones(h))

    def warm_start(self, objective: Objective, h: int, r: int, generator: torch.Generator) -> Start:
        """Truncated SVD in the objective's norm, the optimum (Eckart and Young, 1936)."""
        left, right = balanced_factors(objective.spectrum, h * r)
        A = left.unflatten(1, (h, r)).to(objective.weight.dtype)
        B = right.unflatten(1, (h, r)).to(objective.weight.dtype)
        return Start(Triplets(A, B, torch.ones_like(A[0, :, 0])), optimum=objective.spectrum.tail(h * r))
