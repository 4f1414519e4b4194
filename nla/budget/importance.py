"""How much a triplet matters to the loss, from the gradients of a training."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nla.matrix.triplets import Triplets

IMPORTANCE_QUANTILES = (0.0, 0.25, 0.5, 0.75, 1.0)


class Importance:
    """Smoothed sensitivity times its uncertainty, of every parameter of all triplets (AdaLoRA, eq. 8 to 10; NLA).

        I = |w dL/dw|,  I' <- beta1 I' + (1 - beta1) I,  U <- beta2 U + (1 - beta2) |I - I'|,  s(w) = I' U

    Beside I' and U it never holds more than the numbers of one factor.

    Args:
        triplets: one container per term; only shapes, type and device are taken from it.
    """

    def __init__(self, triplets: Sequence[Triplets], beta1: float, beta2: float) -> None:
        self.beta1, self.beta2 = beta1, beta2
        self.smoothed = [t.map(torch.zeros_like) for t in triplets]
        self.uncertainty = [t.map(torch.zeros_like) for t in triplets]

    @torch.no_grad()
    def update(self, values: Sequence[Triplets], gradients: Sequence[Triplets]) -> None:
        """One step of smoothing."""
        for many in zip(values, gradients, self.smoothed, self.uncertainty, strict=True):
            for parts in zip(*(t.tensors for t in many), strict=True):
                self.smooth(*parts)

    def smooth(self, w: Tensor, g: Tensor, smoothed: Tensor, uncertainty: Tensor) -> None:
        sensitivity = (w * g).abs_()
        smoothed.lerp_(sensitivity, 1 - self.beta1)
        uncertainty.lerp_(sensitivity.sub_(smoothed).abs_(), 1 - self.beta2)

    @torch.no_grad()
    def scores(self) -> list[Tensor]:
        """s(mu_l) + mean s(A[:, l, :]) + mean s(B[:, l, :]) of each term's triplets: (h,)"""
        return [
            s.mu * u.mu + mean_product(s.A, u.A) + mean_product(s.B, u.B)
            for s, u in zip(self.smoothed, self.uncertainty, strict=True)
        ]


def mean_product(a: Tensor, b: Tensor) -> Tensor:
    """Mean of a * b over rows and columns: (n, h, r) twice -> (h,)"""
    return (a * b).mean(dim=(0, 2))


def best(scores: Tensor, costs: Tensor, budget: int) -> Tensor:
    """Which triplets (count,) are kept: the best first, of equal scores the earlier, for as long as their costs fit the budget.

    What is left of the budget is less than the next triplet costs.
    """
    order = torch.argsort(scores, descending=True, stable=True)
    keep = torch.zeros_like(costs, dtype=torch.bool)
    keep[order] = costs[order].cumsum(0) <= budget
    return keep
