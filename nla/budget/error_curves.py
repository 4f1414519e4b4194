"""Shares by the method's own error curves: bits go where they lower the model's expected loss most for each bit."""

from collections.abc import Sequence

import numpy as np
import torch

from nla.budget.base import ModelView, Target
from nla.budget.marginal import gradient_of_outputs
from nla.budget.measured import MeasuredBudget
from nla.machine.errors import UserError, require_positive
from nla.matrix.objective import Norms
from nla.methods.fit import Fit, errors
from nla.models.select import LinearSpec

Point = tuple[int, float]  # bits, and the expected rise of the loss
GAP = 1e-6  # relative distance to the smallest sum at which the search ends


class ErrorCurves(MeasuredBudget):
    """Minimises the expected rise of the model's loss, summed over the matrices, for any method.

    The method fits each matrix at several sizes. The rise is (|g|^2 / out)^emphasis times the squared error of the outputs, as
    in `nla.budget.marginal`, but with the error of the fit. One size is chosen for each matrix, such that the sum of the rises
    is the smallest within the target (an integer programme, as in LQ-LoRA, Guo et al., 2024).

    Args:
        emphasis: see `nla.budget.marginal.MarginalGain`.
        candidates: sizes at which each matrix is fitted, as multiples of its uniform share. With 1, or less, among them.

    Raises:
        UserError: an argument is out of range; it names the setting.
    """

    needs = frozenset({"gram", "fisher"})

    def __init__(self, emphasis: float, candidates: list[float]) -> None:
        require_positive("budget.emphasis", emphasis)
        if not candidates or not all(isinstance(c, int | float) and c > 0 for c in candidates) or min(candidates) > 1:
            raise UserError(f"budget.candidates={candidates} must be multiples of a uniform share, with one of 1 at most")
        self.emphasis, self.candidates = emphasis, sorted(candidates)

    def look(self, specs: list[LinearSpec], target: Target, view: ModelView) -> dict[str, int]:
        most = target.bits * sum(spec.n_params for spec in specs)
        curves = [self.curve(spec, target, view) for spec in specs]
        chosen = smallest_sum(curves, most)
        return {spec.name: bits for spec, bits in zip(specs, chosen, strict=True)}

    def curve(self, spec: LinearSpec, target: Target, view: ModelView) -> list[Point]:
        """The points of the sizes that the method can have, by the bits that it takes. Bits are whole numbers.

        Raises:
            UserError: no candidate up to the uniform share allows a term.
        """
        norms = view.norms(spec.name)
        weight = (gradient_of_outputs(norms) / len(norms.weight)) ** self.emphasis * norms.outputs.spectrum.energy
        asked = (int(min(candidate * target.bits, target.width) * spec.n_params) for candidate in self.candidates)
        sizes = sorted({view.size(spec.name, bits) for bits in asked} - {0})
        if not sizes or sizes[0] > target.bits * spec.n_params:
            raise UserError(
                f"budget.candidates={self.candidates} of {target.asked} buy nothing for {spec.name} up to its uniform share; "
                "ask for more bits"
            )
        fits = view.fits(spec.name, sizes)
        return [(bits, weight * weighted_error(fit, norms)) for bits, fit in zip(sizes, fits, strict=True)]


def weighted_error(fit: Fit, norms: Norms) -> float:
    """The weighted error of a fit. Methods that read no Gram matrix do not report it."""
    if fit.weighted_error is not None:
        return fit.weighted_error
    with torch.no_grad():
        return errors(norms.outputs, fit.term.as_stored(torch.float32), 1).own


def smallest_sum(curves: Sequence[Sequence[Point]], most: float) -> list[int]:
    """The bits of one point of each curve, such that their sum is at most `most` and the sum of the rises is the smallest.

    The first points of all curves must fit together. The sum is within GAP of the smallest.
    """
    bound = most
    while True:
        chosen = solved(curves, bound)
        if sum(chosen) <= most:
            return chosen
        bound -= sum(chosen) - most  # the solver lets a sum exceed its bound by a millionth


def solved(curves: Sequence[Sequence[Point]], most: float) -> list[int]:
    """The solver's answer to `smallest_sum`. If it finds none, the bits of the first points."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    points = [point for curve in curves for point in curve]
    bits, rises = (np.array(values, dtype=float) for values in zip(*points, strict=True))
    owner = np.repeat(np.arange(len(curves)), [len(curve) for curve in curves])
    one_of_each = LinearConstraint(owner == np.arange(len(curves))[:, None], 1, 1)
    within = LinearConstraint(bits[None] / most, 0, 1)
    scaled = rises / max(rises.max(), 1e-300)
    found = milp(scaled, integrality=1, bounds=Bounds(0, 1), constraints=[one_of_each, within], options={"mip_rel_gap": GAP})
    if found.x is None:
        return [int(curve[0][0]) for curve in curves]
    return [int(b) for b, x in zip(bits, found.x, strict=True) if x > 0.5]
