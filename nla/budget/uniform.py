"""The same bits per weight for every matrix."""

from nla.budget.base import Budget, Target
from nla.models.select import LinearSpec


class Uniform(Budget):
    """floor(bits * out * in) bits for each matrix."""

    def allocate(self, specs: list[LinearSpec], target: Target) -> dict[str, int]:
        return {s.name: int(target.bits * s.n_params) for s in specs}
