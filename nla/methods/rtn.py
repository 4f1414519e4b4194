"""Round to nearest, the simplest quantisation."""

from nla.codes.grid_format import GridFormat
from nla.codes.rounding import Rounded, rounded_to_nearest
from nla.matrix.objective import Objective
from nla.methods.grid_method import GridMethod


class RTN(GridMethod):
    """Every weight is rounded to the nearest level, with the scale and zero point of least squared error for each group."""

    def rounded(self, objective: Objective, form: GridFormat) -> Rounded:
        return rounded_to_nearest(objective.weight, form)
