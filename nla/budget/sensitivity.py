"""Shares by sensitivity: matrices whose compression hurts little are compressed more (ASVD's search, Yuan et al., 2023)."""

from nla.budget.base import Budget, Measure
from nla.budget.uniform import Uniform
from nla.machine.errors import UserError, require_integer
from nla.models.select import LinearSpec


class Sensitivity(Budget):
    """Each matrix alone is compressed to each candidate, and the loss on calibration samples measured. Then one loss for all is
    sought: every matrix gets the smallest candidate that stays below it, and the whole fits the budget.

    Args:
        candidates: kept fractions of a matrix.
        samples: calibration samples that the loss is measured on.
    """

    searches = True

    def __init__(self, candidates: list[float], samples: int) -> None:
        require_integer("budget.samples", samples, 1)
        if not candidates or not all(0 < c < 1 for c in candidates):
            raise UserError(f"budget.candidates={candidates} must be kept fractions between 0 and 1")
        self.candidates, self.samples = sorted(candidates), samples

    def allocate(self, specs: list[LinearSpec], ratio: float) -> dict[str, int]:
        """Equal shares, before anything is measured."""
        if self.candidates[0] > 1 - ratio:
            raise UserError(
                f"budget.candidates={self.candidates} keep more than ratio={ratio} leaves; add one of {1 - ratio:.3g} at most"
            )
        return Uniform().allocate(specs, ratio)

    def search(self, specs: list[LinearSpec], ratio: float, measure: Measure) -> dict[str, int]:
        sizes = {s.name: [int(c * s.n_params) for c in self.candidates] for s in specs}
        losses = {name: [measure(name, n) for n in options] for name, options in sizes.items()}
        budget = (1 - ratio) * sum(s.n_params for s in specs)
        shares = {name: options[0] for name, options in sizes.items()}
        for bound in sorted({loss for found in losses.values() for loss in found}, reverse=True):
            tighter = {name: self.smallest(sizes[name], losses[name], bound) for name in sizes}
            if sum(tighter.values()) > budget:
                break
            shares = tighter
        return shares

    @staticmethod
    def smallest(options: list[int], losses: list[float], bound: float) -> int:
        """The smallest option with a loss below the bound; the largest where none is."""
        return next((n for n, loss in zip(options, losses, strict=True) if loss < bound), options[-1])
