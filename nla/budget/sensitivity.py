"""Shares by sensitivity: a matrix keeps more if its compression raises the loss more (ASVD's search, Yuan et al., 2023)."""

from nla.budget.base import ModelView, Target
from nla.budget.measured import MeasuredBudget
from nla.machine.errors import UserError, require_integer
from nla.models.select import LinearSpec


class Sensitivity(MeasuredBudget):
    """More bits for the matrices whose compression alone raises the model's loss most.

    Each matrix alone is compressed to each candidate size, and the loss on calibration samples is measured. Every matrix then
    gets the smallest candidate whose loss is below a common bound, or stays dense if there is none. The bound is the lowest
    for which all fit the target.

    Args:
        candidates: fractions of a matrix that may be kept.
        samples: number of calibration samples that the loss is measured on.

    Raises:
        UserError: an argument is out of range; it names the setting.
    """

    def __init__(self, candidates: list[float], samples: int) -> None:
        require_integer("budget.samples", samples, 1)
        if not candidates or not all(0 < c < 1 for c in candidates):
            raise UserError(f"budget.candidates={candidates} must be kept fractions between 0 and 1")
        self.candidates, self.samples = sorted(candidates), samples

    def allocate(self, specs: list[LinearSpec], target: Target) -> dict[str, int]:
        """Raises UserError if all candidates exceed the target."""
        self.require_one_within(target)
        return super().allocate(specs, target)

    def require_one_within(self, target: Target) -> None:
        """Raise UserError if all candidates exceed the target."""
        if self.candidates[0] > target.kept:
            raise UserError(
                f"budget.candidates={self.candidates} keep more than {target.asked} leaves; "
                f"add one of {target.kept:.3g} at most"
            )

    def look(self, specs: list[LinearSpec], target: Target, view: ModelView) -> dict[str, int]:
        self.require_one_within(target)
        sizes = {s.name: [target.width * int(c * s.n_params) for c in self.candidates] for s in specs}
        losses = {name: view.losses(name, options) for name, options in sizes.items()}
        for spec in specs:
            sizes[spec.name].append(target.width * spec.n_params)  # dense
        most = target.bits * sum(s.n_params for s in specs)
        found = {name: options[0] for name, options in sizes.items()}
        for bound in sorted({loss for measured in losses.values() for loss in measured}, reverse=True):
            tighter = {name: self.smallest(sizes[name], losses[name], bound) for name in sizes}
            if sum(tighter.values()) > most:
                break
            found = tighter
        return found

    @staticmethod
    def smallest(options: list[int], losses: list[float], bound: float) -> int:
        """The smallest option (bits) whose loss is below the bound, or the last, which has no loss, if there is none."""
        return next((bits for bits, loss in zip(options, losses, strict=False) if loss < bound), options[-1])
