"""Keeps triplets on the surfaces that their kernels prescribe for retraining."""

from collections.abc import Mapping

import torch
from torch import Tensor

from nla.kernels.base import Constraint
from nla.matrix.triplets import Triplets
from nla.terms.kernel_term import TENSORS, KernelTerm
from nla.training.parameters import TrainedParameter


class Constraints:
    """The constraints of all terms that this process trains (see `nla.kernels.base.Constraint`).

    The piecewise kernel has one: its self-terms, sum_l mu_l |A_il|^2 and sum_l mu_l |B_jl|^2, stay as they were fitted.

    Args:
        terms: the model's terms, by qualified name.
        own: the parameters that this process updates, by name.
    """

    def __init__(self, terms: Mapping[str, KernelTerm], own: Mapping[str, TrainedParameter]) -> None:
        self.held: dict[str, tuple[Constraint, list[str]]] = {}
        for name, term in terms.items():
            trained = [part for part in TENSORS if f"{name}.{part}" in own]
            if trained:
                moved = {part: own[f"{name}.{part}"].master for part in trained}
                t = Triplets(*(moved[part] if part in moved else fixed(getattr(term, part)) for part in TENSORS))
                constraint = term.kernel.constraint(t, frozenset(trained))
                if constraint is not None:
                    self.held[name] = constraint, trained

    @torch.no_grad()
    def project(self, gradients: Mapping[str, Tensor]) -> None:
        """Remove from the gradients {parameter name: gradient}, in place, the parts that lead away from the surfaces."""
        for name, (constraint, trained) in self.held.items():
            constraint.project({part: gradients[f"{name}.{part}"] for part in trained})

    @torch.no_grad()
    def retract(self) -> None:
        """Move the triplets back to the surfaces, in place, after an optimiser step."""
        for constraint, _ in self.held.values():
            constraint.retract()


def fixed(p: Tensor) -> Tensor:
    """A parameter that is not trained: detached, and in fp32 (or fp64) like those that the optimiser updates."""
    return p.detach().to(torch.promote_types(p.dtype, torch.float32))
