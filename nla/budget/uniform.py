"""Uniform shares: every matrix keeps an equal number of bits per weight."""

from nla.budget.base import Budget, Target
from nla.models.select import LinearSpec


class Uniform(Budget):
    """Gives floor(bits * out * in) bits to each matrix, where `bits` is the target's average per weight."""

    def allocate(self, specs: list[LinearSpec], target: Target) -> dict[str, int]:
        return {s.name: int(target.bits * s.n_params) for s in specs}
