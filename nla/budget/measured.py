"""Budgets whose shares depend on measurements of the model."""

from abc import abstractmethod

from nla.budget.base import ModelView, Target
from nla.budget.uniform import Uniform
from nla.models.select import LinearSpec


class MeasuredBudget(Uniform):
    """A budget that looks at the model before it divides the bits. Until then, shares are uniform."""

    @abstractmethod
    def look(self, specs: list[LinearSpec], target: Target, view: ModelView) -> dict[str, int]:
        """{matrix: bits}. The sum is at most the target's."""
