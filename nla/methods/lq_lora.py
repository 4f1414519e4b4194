"""LQ-LoRA: linear factors and a grid, each fitted to what the other leaves (Guo et al., 2024)."""

from collections.abc import Iterator

from nla.codes.grid_format import GridFormat
from nla.codes.rounding import Rounded
from nla.machine.errors import require_choice
from nla.matrix.objective import Norms, Objective
from nla.methods.grid_plus_low_rank import GridPlusLowRank
from nla.terms.base import Term


class LQLoRA(GridPlusLowRank):
    """L R^T = the best matrix of its rank for W - Q (at first Q = 0), then Q = W - L R^T rounded, until the error rises.

    Args:
        loss: `weight` (||W' - W||^2) or `inputs` (each input counts by its mean square over the calibration tokens).
        levels: of grids of 4 bits, `nf4` (the paper's) or `uniform`.

    Raises:
        UserError: a value is not known.
    """

    def __init__(self, rank: int | None, iterations: int, loss: str, levels: str) -> None:
        super().__init__(rank, iterations)
        require_choice("method.loss", loss, ["weight", "inputs"])
        require_choice("method.levels", levels, ["nf4", "uniform"])
        self.needs = frozenset({"gram"} if loss == "inputs" else ())
        self.kind = levels

    def objective(self, norms: Norms) -> Objective:
        gram = norms.statistics.gram
        if not self.needs or gram is None:
            return norms.plain
        squares = gram.diagonal().double().clamp(min=0)
        return norms.scaled(
            (squares + 1e-6 * squares.mean().clamp(min=1e-30)).sqrt()
        )  # an input that is never on counts little

    def levels(self, form: GridFormat) -> GridFormat:
        return GridFormat(4, form.group, self.kind) if form.width == 4 else form

    def pairs(self, objective: Objective, form: GridFormat, low: Term) -> Iterator[tuple[Rounded, Term]]:
        importance = None if objective.factor is None else objective.factor.S.square()
        return self.factors_first(objective, form, low, importance)
