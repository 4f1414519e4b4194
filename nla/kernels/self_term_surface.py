"""The surface on which the piecewise kernel is retrained: its self-terms keep their fitted values.

The piecewise kernel's matrix has two self-terms, s_i = sum_l mu_l |F_il|^2 for the rows of F = A and F = B. Triplets with
mu > 0 and triplets with mu < 0 nearly cancel in these sums. The loss is so steep in the self-terms that they make up nearly
all of the gradient. A step that moves every number by a thousandth of its size moves the sum by many times its own size:
SmolLM2's loss leapt from 7.9 to 205. So the gradient is projected onto the tangent space of {s = s_fitted}, and after each
step the triplets are moved back to this surface. This costs one degree of freedom per row.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

from nla.matrix.triplets import Triplets

NEWTON_STEPS = 3
LARGEST = 0.1  # largest relative change of a number in one Newton step


class SelfTermSurface:
    """The surface through the current triplets; it implements `nla.kernels.base.Constraint`.

    Args:
        t: triplets that the optimiser changes in place.
        trained: which of A, B and mu it changes.
    """

    def __init__(self, t: Triplets, trained: frozenset[str]) -> None:
        self.mu = t.mu
        factors = {"A": t.A, "B": t.B}
        self.held = {name: (f, self_term(f, t.mu)) for name, f in factors.items() if name in trained}

    def project(self, gradients: Mapping[str, Tensor]) -> None:
        """Remove from the gradients, in place, the component that would change the self-terms.

        For F it is the component along the normal v_i = mu F_i. A change of mu changes the self-terms too, and F has to
        compensate for it. The cost of this compensation is subtracted from the gradient of mu.
        """
        for name, (factor, _) in self.held.items():
            normal = factor * self.mu[:, None]
            along = over_squares((gradients[name] * normal).sum((1, 2)), normal)  # (n,)
            gradients[name].sub_(along[:, None, None] * normal)
            if "mu" in gradients:
                gradients["mu"].sub_(along @ factor.square().sum(-1), alpha=0.5)

    def retract(self) -> None:
        """Move each factor along the normal, in place, until its self-terms have their fitted values (Newton's method).

        A row is not moved if no remaining mu has the sign of its fitted self-term.
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
    """numbers_i / |v_i|^2, or 0 where v_i = 0 (all triplets masked): (n,), (n, h, r) -> (n,)"""
    squares = normal.square().sum((1, 2))
    return torch.where(squares > 0, numbers / squares, 0)
