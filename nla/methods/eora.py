"""EoRA: linear factors that make up for the error of a grid in the layer's outputs (Liu et al., 2024)."""

from collections.abc import Iterator

from nla.codes.feedback import gptq
from nla.codes.grid_format import GridFormat
from nla.codes.rounding import Rounded
from nla.matrix.objective import Norms, Objective
from nla.methods.gptq import gptq_flops
from nla.methods.grid_method import hessian
from nla.methods.grid_plus_low_rank import GridPlusLowRank
from nla.terms.base import Term


class EoRA(GridPlusLowRank):
    """Q = GPTQ(W), then the best matrix of its rank for W - Q in the norm of the layer's outputs.

    The paper projects W - Q to the scaled eigenvectors of the Gram matrix, truncates its SVD and projects back. That is the
    minimum of the same norm (see `nla.matrix.spectrum.WeightedSpectrum`).

    Args:
        sequential: each block is fitted to inputs that passed through the compressed earlier blocks.
    """

    needs = frozenset({"gram"})

    def __init__(self, rank: int | None, sequential: bool) -> None:
        super().__init__(rank, 1)
        self.sequential = sequential

    def objective(self, norms: Norms) -> Objective:
        return norms.outputs

    def pairs(self, objective: Objective, form: GridFormat, low: Term) -> Iterator[tuple[Rounded, Term]]:
        rounded = gptq(objective.weight, hessian(objective), form)
        yield rounded, self.low_rank(objective.weight - rounded.dense(form), objective, low)

    def start_flops(self, term: Term) -> int:
        return super().start_flops(term) + gptq_flops(term.out_features, term.in_features)
