"""CALDERA: a rounded matrix and linear factors, fitted in turn to the layer's outputs (Saha et al., 2024)."""

from nla.machine.errors import require_choice
from nla.matrix.objective import Norms, Objective
from nla.methods.gptq import GPTQ
from nla.methods.packed_svd import svd_with
from nla.methods.quip import QuIP
from nla.methods.rounded_plus_low_rank import RoundedPlusLowRank
from nla.storage.base import Storage

ROUNDINGS = {"lattice": QuIP, "gptq": GPTQ}


class Caldera(RoundedPlusLowRank):
    """Q = W - L R^T rounded, then L R^T = the best matrix of its rank for W - Q in the norm of the outputs, several times.

    Error feedback does not lower the error in each iteration, so the best one is kept.

    Args:
        rounding: `lattice` (the paper's, as `nla.methods.quip` does) or `gptq`, whose first iteration is EoRA's.
        sequential: each layer is fitted to inputs that passed through the compressed earlier layers.
        storage: of the linear factors, see `nla.methods.packed_svd`.

    Raises:
        UserError: a value is not known.
    """

    needs = frozenset({"gram"})
    pairs = RoundedPlusLowRank.rounded_first

    def __init__(self, rank: int | None, iterations: int, rounding: str, sequential: bool, storage: Storage) -> None:
        require_choice("method.rounding", rounding, list(ROUNDINGS))
        super().__init__(rank, iterations, ROUNDINGS[rounding](sequential=False), svd_with(storage))
        self.sequential, self.patience = sequential, self.iterations

    def objective(self, norms: Norms) -> Objective:
        return norms.outputs
