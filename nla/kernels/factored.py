"""Kernels whose matrix is a product of two thin factors."""

from abc import abstractmethod

import torch
from torch import Tensor

from nla.kernels.base import Kernel
from nla.matrix.objective import Objective
from nla.matrix.triplets import Triplets


class FactoredKernel(Kernel):
    """A kernel whose matrix is L(A, mu) @ R(B, mu).T with thin L and R: exact, and never out x in elements."""

    exact_apply = True

    @abstractmethod
    def factors(self, t: Triplets) -> tuple[Tensor, Tensor]:
        """L (out, k) and R (in, k), k = columns(h, r)."""

    @abstractmethod
    def columns(self, h: int, r: int) -> int:
        """Columns of L and R."""

    def rank_bound(self, h: int, r: int) -> int:
        return self.columns(h, r)

    def dense(self, t: Triplets) -> Tensor:
        left, right = self.factors(t)
        return left @ right.T

    def apply(self, t: Triplets, x: Tensor) -> Tensor:
        left, right = self.factors(t)
        return (x @ right) @ left.T

    def squared_error(self, t: Triplets, objective: Objective, products: torch.dtype) -> tuple[Tensor, Triplets]:
        # Three thin products, 6 * out * in * k operations: E = L (S^T R)^T - W S, dL = 2 E S^T R, dR = 2 S E^T L; and two with
        # S, 4 * in^2 * k, where the norm is weighted. Only the element-wise way from triplets to L and R is left to autograd.
        t = t.map(lambda p: p.detach().requires_grad_())
        left, right = self.factors(t)
        with torch.no_grad():
            low_left, low_right, target = left.to(products), objective.seen(right.to(products)), objective.target
            error = torch.addmm(target.to(products), low_left, low_right.T, beta=-1)
            loss = torch.linalg.vector_norm(error, dtype=target.dtype).square()
            d_left = (error @ low_right).to(target.dtype).mul_(2)
            d_right = objective.unseen(error.T @ low_left).to(target.dtype).mul(2)
        return loss, Triplets(*torch.autograd.grad((left, right), (t.A, t.B, t.mu), (d_left, d_right)))

    def forward_flops(self, out_features: int, in_features: int, h: int, r: int, tokens: int) -> int:
        return 2 * tokens * (out_features + in_features) * self.columns(h, r)

    def fit_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        return 6 * out_features * in_features * self.columns(h, r)

    def weighting_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        return 4 * in_features * in_features * self.columns(h, r)
