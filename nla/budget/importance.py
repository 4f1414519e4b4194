"""Importance of triplets: how strongly the loss depends on each, estimated from gradients during training."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nla.matrix.triplets import Triplets

IMPORTANCE_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Importance:
    """Importance of each parameter: smoothed sensitivity times its uncertainty (AdaLoRA, Zhang et al., 2023, eq. 8 to 10; NLA).

        I = |w dL/dw|,  I' <- beta1 I' + (1 - beta1) I,  U <- beta2 U + (1 - beta2) |I - I'|,  s(w) = I' U

    Memory: I', U, and one temporary tensor of the size of a factor A or B.

    Args:
        triplets: one container per term. Only shapes, type and device are used.
    """

    def __init__(self, triplets: Sequence[Triplets], beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.smoothed = [t.map(torch.zeros_like) for t in triplets]
        self.uncertainty = [t.map(torch.zeros_like) for t in triplets]

    @torch.no_grad()
    def update(self, values: Sequence[Triplets], gradients: Sequence[Triplets]) -> None:
        """Update I' and U after one step. `values` and `gradients` are containers of the same shapes, one per term."""
        for many in zip(values, gradients, self.smoothed, self.uncertainty, strict=True):
            for parts in zip(*(t.tensors for t in many), strict=True):
                self.smooth(*parts)

    def smooth(self, w: Tensor, g: Tensor, smoothed: Tensor, uncertainty: Tensor) -> None:
        """Update I' and U of one tensor, in place."""
        sensitivity = (w * g).abs_()
        smoothed.lerp_(sensitivity, 1 - self.beta1)
        uncertainty.lerp_(sensitivity.sub_(smoothed).abs_(), 1 - self.beta2)

    @torch.no_grad()
    def scores(self) -> list[Tensor]:
        """The score of each triplet, s(mu_l) + mean s(A[:, l, :]) + mean s(B[:, l, :]): (h,) for each term."""
        return [
            s.mu * u.mu + mean_product(s.A, u.A) + mean_product(s.B, u.B)
            for s, u in zip(self.smoothed, self.uncertainty, strict=True)
        ]


def mean_product(a: Tensor, b: Tensor) -> Tensor:
    """Mean of a * b over rows and columns: (n, h, r) twice -> (h,)"""
    return (a * b).mean(dim=(0, 2))


def best(scores: Tensor, costs: Tensor, budget: int) -> Tensor:
    """Boolean mask (count,) of the triplets to keep: those with the highest scores, as long as their costs fit the budget.

    Of equal scores, the earlier triplet comes first. The unspent rest of the budget is less than the cost of the next triplet.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    keep = torch.zeros_like(costs, dtype=torch.bool)
    keep[order] = costs[order].cumsum(0) <= budget
    return keep
