"""Training on the surface where self-terms stay as they were fitted.

The piecewise kernel's matrix has two self-terms, s_i = sum_l mu_l |F_il|^2 for the rows of F = A and F = B, which cancel
between triplets with mu of either sign. The loss is so steep in them that a gradient is nearly all theirs, and a step that
moves all numbers by a thousandth of their size moves the sum by many times its own: SmolLM2's loss leapt from 7.9 to 205. So
gradients are projected on the tangent of {s = s_fitted}, and steps are drawn back to it. One number per row is lost.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from nla.compressed.layer import Term
from nla.kernels.piecewise import self_term
from nla.training.parameters import TrainedParameter

NEWTON_STEPS = 3
LARGEST = 0.1  # relative change of a number in one of them


@dataclass(frozen=True)
class Held:
    """A trained factor (n, h, r) under its name, mu (h,), which may be trained too, and the self-terms (n,) it keeps."""

    name: str
    factor: Tensor
    mu_name: str
    mu: Tensor
    self_terms: Tensor

    def project(self, gradients: Mapping[str, Tensor]) -> None:
        """Take from the gradient what would change self-terms, in place.

        Along the normal v_i = mu F_i; what mu does to self-terms is made up for by F, so its gradient loses that part too.
        """
        normal = self.factor * self.mu[:, None]
        along = over_squares((gradients[self.name] * normal).sum((1, 2)), normal)  # (n,)
        gradients[self.name].sub_(along[:, None, None] * normal)
        if self.mu_name in gradients:
            gradients[self.mu_name].sub_(along @ self.factor.square().sum(-1), alpha=0.5)

    def retract(self) -> None:
        """Move the factor along the normal until its self-terms are again what they were (Newton's method), in place.

        Where all triplets that are left have mu of one sign, no factor has self-terms of the other: those rows stay.
        """
        within_reach = torch.where(self.self_terms > 0, (self.mu > 0).any(), (self.mu < 0).any())  # (n,)
        for _ in range(NEWTON_STEPS):
            normal = self.factor * self.mu[:, None]
            excess = over_squares(self_term(self.factor, self.mu) - self.self_terms, normal) / 2  # (n,)
            excess = torch.where(within_reach, excess, 0)
            change = (excess[:, None] * self.mu).clamp_(-LARGEST, LARGEST)  # (n, h), relative
            self.factor.mul_(1 - change[:, :, None])


def over_squares(numbers: Tensor, normal: Tensor) -> Tensor:
    """numbers_i / |v_i|^2, or 0 where all triplets are masked: (n,), (n, h, r) -> (n,)"""
    squares = normal.square().sum((1, 2))
    return torch.where(squares > 0, numbers / squares, 0)


class Surface:
    """All factors that keep their self-terms, of those that this process owns."""

    def __init__(self, held: Sequence[Held] = ()) -> None:
        self.held = held

    @torch.no_grad()
    def project(self, gradients: Mapping[str, Tensor]) -> None:
        for factor in self.held:
            factor.project(gradients)

    @torch.no_grad()
    def retract(self) -> None:
        for factor in self.held:
            factor.retract()


def surface_of(terms: Mapping[str, Term], own: Mapping[str, TrainedParameter]) -> Surface:
    """The surface through the trained factors as they are."""
    held = []
    for name, term in terms.items():
        for part in (f"{name}.A", f"{name}.B"):
            if term.kernel.has_self_terms and part in own:
                factor = own[part].master
                mu = own[f"{name}.mu"].master if f"{name}.mu" in own else term.mu.detach().to(factor.dtype)
                held.append(Held(part, factor, f"{name}.mu", mu, self_term(factor, mu)))
    return Surface(held)
