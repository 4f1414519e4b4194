"""EoRA: linear factors that make up for the error of a grid in the layer's outputs (Liu et al., 2024)."""

from nla.matrix.objective import Norms, Objective
from nla.methods.gptq import GPTQ
from nla.methods.rounded_plus_low_rank import RoundedPlusLowRank
from nla.methods.svd import SVD


class EoRA(RoundedPlusLowRank):
    """Q = GPTQ(W), then the best matrix of its rank for W - Q in the norm of the layer's outputs.

    The paper projects W - Q to the scaled eigenvectors of the Gram matrix, truncates its SVD and projects back. That is the
    minimum of the same norm (see `nla.matrix.spectrum.WeightedSpectrum`).

    Args:
        sequential: each layer is fitted to inputs that passed through the compressed earlier layers.
    """

    needs = frozenset({"gram"})
    pairs = RoundedPlusLowRank.rounded_first

    def __init__(self, rank: int | None, sequential: bool) -> None:
        super().__init__(rank, 1, GPTQ(sequential=False), SVD())
        self.sequential = sequential

    def objective(self, norms: Norms) -> Objective:
        return norms.outputs
