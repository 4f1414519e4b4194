"""What methods share that round a matrix once: the start is the whole fit."""

import torch
from torch import Tensor

from nla.codes.feedback import Hessian
from nla.matrix.objective import Objective
from nla.methods.base import MatrixMethod
from nla.solvers.base import Solution, Status
from nla.terms.base import Term


class Rounding(MatrixMethod):
    """A method whose `start` rounds the matrix. No step follows."""

    def find(self, objective: Objective, planned: Term, generator: torch.Generator) -> Solution:
        term = self.start(objective, planned, generator).term
        return Solution(term, [(0, relative_error(term.dense().detach(), objective))], 0, Status.ROUNDED, None)


def relative_error(matrix: Tensor, objective: Objective) -> float:
    """||(W' - W) S||^2 / ||W S||^2 of a matrix W' (out, in)."""
    return float(objective.squared(matrix - objective.weight)[0]) / (objective.energy or 1.0)


def hessian(objective: Objective) -> Hessian:
    """The Gram matrix of an activation norm, for rounding with error feedback."""
    assert objective.factor is not None
    return Hessian(objective.factor.gram)
