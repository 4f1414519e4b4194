"""The surface on which the piecewise kernel is retrained: self-terms stay as they were fitted.

The piecewise kernel's matrix has two self-terms, s_i = sum_l mu_l |F_il|^2 for the rows of F = A and F = B. Triplets with
mu > 0 and with mu < 0 cancel in them. The loss is so steep in the self-terms that they make up nearly all of the gradient. A
step that moves every number by a thousandth of its size moves the sum by many times its own size: SmolLM2's loss leapt from
7.9 to 205. So the gradient is projected on the tangent of {s = s_fitted}, and each step is drawn back to it. This costs one
degree of freedom per row.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nla.matrix.triplets import Triplets

NEWTON_STEPS = 3
LARGEST = 0.1  # relative change of a number in one of them


class SelfTermSurface:
    """The surface through the triplets as they are (see `nla.kernels.base.Constraint`).

    Args:
        t: triplets that the optimiser changes in place.
        trained: which of A, B and mu it changes.
    """

    def __init__(self, t: Triplets, trained: frozenset[str]) -> None:
        self.mu = t.mu
        factors = {"A": t.A, "B": t.B}
        self.held = {name: (f, self_term(f, t.mu)) for name, f in factors.items() if name in trained}

    def project(self, gradients: Mapping[str, Tensor]) -> None:
        """Take from the gradients what would change the self-terms, in place.

        That is the part of F's gradient along the normal v_i = mu F_i. A change of mu changes self-terms too; F makes up for
        it, so the gradient of mu loses what F pays.
        """
        for name, (factor, _) in self.held.items():
            normal = factor * self.mu[:, None]
            along = over_squares((gradients[name] * normal).sum((1, 2)), normal)  # (n,)
            gradients[name].sub_(along[:, None, None] * normal)
            if "mu" in gradients:
                gradients["mu"].sub_(along @ factor.square().sum(-1), alpha=0.5)

    def retract(self) -> None:
        """Move each factor along the normal until its self-terms are what they were (Newton's method), in place.

        A row stays as it is where no triplet with a mu of the sign that its self-term needs is left.
        """
        for factor, self_terms in self.held.values():
            within_reach = torch.where(self_terms > 0, (self.mu > 0).any(), (self.mu < 0).any())  # (n,)
            for _ in range(NEWTON_STEPS):
                normal = factor * self.mu[:, None]
                excess = over_squares(self_term(factor, self.mu) - self_terms, normal) / 2  # (n,)
                excess = torch.where(within_reach, excess, 0)
                change = (excess[:, None] * self.mu).clamp_(-LARGEST, LARGEST)  # (n, h), relative
                factor.mul_(1 - change[:, :, None])


def self_term(factor: Tensor, mu: Tensor) -> Tensor:
    """sum_l mu_l ||factor_il||^2: (n, h, r), (h,) -> (n,)"""
    return factor.square().sum(-1) @ mu


def over_squares(numbers: Tensor, normal: Tensor) -> Tensor:
    """numbers_i / |v_i|^2, or 0 where all triplets are masked: (n,), (n, h, r) -> (n,)"""
    squares = normal.square().sum((1, 2))
    return torch.where(squares > 0, numbers / squares, 0)
