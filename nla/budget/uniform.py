"""The same kept fraction for every matrix."""

from nla.budget.base import Budget
from nla.models.select import LinearSpec


class Uniform(Budget):
    """floor((1 - ratio) * out * in) parameters for each matrix."""

    def allocate(self, specs: list[LinearSpec], ratio: float) -> dict[str, int]:
        return {s.name: int((1 - ratio) * s.n_params) for s in specs}
