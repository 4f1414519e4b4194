"""A plan: how many parameters each matrix may keep."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from nla.errors import UserError
from nla.kernels.base import Kernel
from nla.select import LinearSpec


@dataclass(frozen=True)
class PlanEntry:
    """One matrix: its budget, and what the kernel makes of it."""

    spec: LinearSpec
    n_params: int
    h: int
    r: int
    kernel: Kernel

    @property
    def realised(self) -> int:
        """Parameters of h triplets: at most n_params."""
        return self.h * ((self.spec.out_features + self.spec.in_features) * self.r + 1)


class Budget(ABC):
    """Shares out what a ratio leaves."""

    @abstractmethod
    def allocate(self, specs: list[LinearSpec], ratio: float) -> dict[str, int]:
        """Parameters per matrix name; together at most (1 - ratio) of the dense parameters."""


def make_plan(specs: list[LinearSpec], ratio: float, budget: Budget, kernel: Kernel) -> list[PlanEntry]:
    """Budgets and sizes of all matrices.

    Raises:
        UserError: the ratio leaves some matrix less than one triplet.
    """
    allocated = budget.allocate(specs, ratio)
    plan = [
        PlanEntry(s, allocated[s.name], *kernel.size(s.out_features, s.in_features, allocated[s.name]), kernel) for s in specs
    ]
    for entry in plan:
        if entry.h == 0:
            spec = entry.spec
            one = spec.out_features + spec.in_features + 1
            most = math.floor(1000 * (1 - one / spec.n_params)) / 1000
            remedy = f"use ratio={most} at most" if most > 0 else "exclude it with select.exclude"
            raise UserError(
                f"ratio={ratio} leaves {spec.name} ({spec.out_features}x{spec.in_features}) {entry.n_params} parameters, "
                f"less than its smallest triplet of {one}; {remedy}"
            )
    return plan
