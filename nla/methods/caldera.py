"""CALDERA: a grid with error feedback and linear factors, fitted in turn to the layer's outputs (Saha et al., 2024)."""

from collections.abc import Iterator

from nla.codes.feedback import gptq
from nla.codes.grid_format import GridFormat
from nla.codes.rounding import Rounded
from nla.matrix.objective import Norms, Objective
from nla.methods.gptq import gptq_flops
from nla.methods.grid_method import hessian
from nla.methods.grid_plus_low_rank import GridPlusLowRank
from nla.methods.packed_svd import svd_with
from nla.storage.base import Storage
from nla.terms.base import Term


class Caldera(GridPlusLowRank):
    """Q = GPTQ(W - L R^T), then L R^T = the best matrix of its rank for W - Q in the norm of the outputs, several times.

    The paper rounds Q to a lattice after random rotations (as `nla.methods.quip` does), which is stronger than GPTQ in 2 bits.

    Error feedback does not lower the error in each iteration, so the best one is kept. The first one is EoRA's.

    Args:
        sequential: each block is fitted to inputs that passed through the compressed earlier blocks.
        storage: of the linear factors, see `nla.methods.packed_svd`.
    """

    needs = frozenset({"gram"})

    def __init__(self, rank: int | None, iterations: int, sequential: bool, storage: Storage) -> None:
        super().__init__(rank, iterations, svd_with(storage))
        self.sequential, self.patience = sequential, self.iterations

    def objective(self, norms: Norms) -> Objective:
        return norms.outputs

    def pairs(self, objective: Objective, form: GridFormat, low: Term) -> Iterator[tuple[Rounded, Term]]:
        weight = rest = objective.weight
        of_outputs = hessian(objective)
        while True:
            rounded = gptq(rest, of_outputs, form)
            factors = self.low_rank(weight - rounded.dense(form), objective, low)
            yield rounded, factors
            rest = weight - factors.dense().detach()

    def start_flops(self, term: Term) -> int:
        return super().start_flops(term) + gptq_flops(term.out_features, term.in_features)
