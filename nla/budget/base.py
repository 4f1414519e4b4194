"""A plan: how many parameters each matrix may keep."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

from nla.kernels.base import Kernel
from nla.machine.errors import UserError
from nla.matrix.triplets import triplet_size
from nla.models.select import LinearSpec


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
        return self.h * triplet_size(self.spec.out_features, self.spec.in_features, self.r)


Measure = Callable[[str, int], float]  # the model's loss with one matrix compressed to so many parameters


class Budget(ABC):
    """Shares out what a ratio leaves.

    Attributes:
        searches: shares are known only after search().
        tightens: shares are what retraining begins with; it ends within the ratio.
    """

    searches = False
    tightens = False

    @abstractmethod
    def allocate(self, specs: list[LinearSpec], ratio: float) -> dict[str, int]:
        """Parameters per matrix name; together at most (1 - ratio) of the dense parameters."""

    def search(self, specs: list[LinearSpec], ratio: float, measure: Measure) -> dict[str, int]:
        """The same, with the model at hand."""
        return self.allocate(specs, ratio)

    def check_retraining(self, steps: int, train: list[list[str]]) -> None:  # noqa: B027 (most budgets go with any)
        """Raise UserError if this budget does not go with a retraining of so many steps and these stages of parts."""


def make_plan(specs: list[LinearSpec], ratio: float, allocated: dict[str, int], kernel: Kernel) -> list[PlanEntry]:
    """Budgets and sizes of all matrices.

    Raises:
        UserError: the ratio leaves some matrix less than one triplet.
    """
    plan = [
        PlanEntry(s, allocated[s.name], *kernel.size(s.out_features, s.in_features, allocated[s.name]), kernel) for s in specs
    ]
    starved = [entry.spec for entry in plan if entry.h < 1]
    if starved:
        spec = min(starved, key=highest_ratio)
        most = math.floor(1000 * highest_ratio(spec)) / 1000
        remedy = f"use ratio={most} at most" if most > 0 else "exclude it with select.exclude"
        raise UserError(
            f"ratio={ratio} leaves {spec.name} ({spec.out_features}x{spec.in_features}) {allocated[spec.name]} parameters, "
            f"less than its smallest triplet of {triplet_size(spec.out_features, spec.in_features, 1)}; {remedy}"
        )
    return plan


def highest_ratio(spec: LinearSpec) -> float:
    """The ratio that leaves one triplet."""
    return 1 - triplet_size(spec.out_features, spec.in_features, 1) / spec.n_params
