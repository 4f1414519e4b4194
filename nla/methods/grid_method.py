"""Methods whose term is one grid: quantisation of the weights."""

from abc import abstractmethod
from collections.abc import Sequence

import torch

from nla.codes.grid_format import GridFormat, formats, largest, least_grid_bits
from nla.codes.rounding import Rounded
from nla.matrix.objective import Objective
from nla.methods.base import Shape
from nla.methods.rounding import Rounding
from nla.solvers.base import Start
from nla.terms.base import Term
from nla.terms.grid import Grid, grid_of
from nla.terms.kernel_term import nothing

RTN_FLOPS = 300  # operations for each weight of the search for the best scales and zero points


class GridMethod(Rounding):
    """A method whose grid has the most bits of all widths and groups that fit (see `nla.codes.grid_format`)."""

    @abstractmethod
    def rounded(self, objective: Objective, form: GridFormat) -> Rounded:
        """The weight of the objective on a grid."""

    def levels(self, form: GridFormat) -> GridFormat:
        """The format with the levels of the method, which takes no more bits. The default is the format itself."""
        return form

    def plan_matrix(self, out_features: int, in_features: int, bits: int, dtype: torch.dtype) -> Term:
        form = largest(map(self.levels, formats(in_features)), out_features, in_features, bits)
        if form is None:
            return nothing(out_features, in_features, dtype)
        return Grid.empty(out_features, in_features, form.width, form.group, form.kind, dtype)

    def least_bits(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        return sum(least_grid_bits(m, n) for m, n in shapes)

    def start(self, objective: Objective, planned: Term, generator: torch.Generator) -> Start:
        assert isinstance(planned, Grid)
        return Start(grid_of(self.rounded(objective, planned.form), planned.form))

    def start_flops(self, term: Term) -> int:
        return RTN_FLOPS * term.out_features * term.in_features
