"""Round to nearest, the simplest quantisation."""

from nla.codes.grid_format import GridFormat
from nla.codes.rounding import Rounded, rounded_to_nearest
from nla.machine.errors import require_choice
from nla.matrix.objective import Objective
from nla.methods.grid_method import GridMethod


class RTN(GridMethod):
    """Every weight is rounded to the nearest level, with the scale and zero point of least squared error for each group.

    In a norm that weights inputs, the error of each input counts by the square of its weight.

    Args:
        levels: of grids of 4 bits, `uniform` or `nf4` (quantiles of a normal distribution; Dettmers et al., 2023).

    Raises:
        UserError: the levels are not known.
    """

    def __init__(self, levels: str) -> None:
        require_choice("method.levels", levels, ["uniform", "nf4"])
        self.kind = levels

    def levels(self, form: GridFormat) -> GridFormat:
        return GridFormat(4, form.group, self.kind) if form.width == 4 else form

    def rounded(self, objective: Objective, form: GridFormat) -> Rounded:
        importance = None if objective.factor is None else objective.factor.S.square()
        return rounded_to_nearest(objective.weight, form, importance)
