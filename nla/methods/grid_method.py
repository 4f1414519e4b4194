"""Methods whose term is one grid: quantisation of the weights."""

from abc import abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from nla.codes.feedback import Hessian
from nla.codes.grid_format import GridFormat, fitting, least_grid_bits
from nla.codes.rounding import Rounded
from nla.kernels.linear import Linear
from nla.matrix.objective import Objective
from nla.methods.base import MatrixMethod, Shape
from nla.solvers.base import Solution, Start, Status
from nla.terms.base import Term
from nla.terms.grid import Grid, grid_of
from nla.terms.kernel_term import KernelTerm

RTN_FLOPS = 300  # operations for each weight of the search for the best lattices


class GridMethod(MatrixMethod):
    """A method whose grid has the most bits of all widths and groups that fit (see `nla.codes.grid_format`)."""

    @abstractmethod
    def rounded(self, objective: Objective, form: GridFormat) -> Rounded:
        """The weight of the objective on a grid."""

    def levels(self, form: GridFormat) -> GridFormat:
        """The format with the levels of the method, which takes no more bits. The default is the format itself."""
        return form

    def plan_matrix(self, out_features: int, in_features: int, bits: int, dtype: torch.dtype) -> Term:
        found = fitting(out_features, in_features, bits)
        if not found:
            return nothing(out_features, in_features, dtype)
        form = self.levels(found[0])
        return Grid.empty(out_features, in_features, form.width, form.group, form.kind, dtype)

    def least_bits(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        return sum(least_grid_bits(m, n) for m, n in shapes)

    def start(self, objective: Objective, planned: Term, generator: torch.Generator) -> Start:
        assert isinstance(planned, Grid)
        return Start(grid_of(self.rounded(objective, planned.form), planned.form))

    def find(self, objective: Objective, planned: Term, generator: torch.Generator, memory: ExitStack) -> Solution:
        term = self.start(objective, planned, generator).term
        return Solution(term, [(0, relative_error(term.dense().detach(), objective))], 0, Status.ROUNDED, None)

    def start_flops(self, term: Term) -> int:
        return RTN_FLOPS * term.out_features * term.in_features


def relative_error(matrix: Tensor, objective: Objective) -> float:
    """||(W' - W) S||^2 / ||W S||^2 of a matrix W' (out, in)."""
    return float(objective.squared(matrix - objective.weight)[0]) / (objective.energy or 1.0)


def hessian(objective: Objective) -> Hessian:
    """The Gram matrix of an activation norm, for rounding with error feedback."""
    assert objective.factor is not None
    return Hessian(objective.factor.gram)


def nothing(out_features: int, in_features: int, dtype: torch.dtype) -> Term:
    """The term of a matrix whose bits buy nothing; it stores no number."""
    return KernelTerm.empty(Linear(), out_features, in_features, 0, 1, dtype)
