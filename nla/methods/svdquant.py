"""SVDQuant's weights: the largest singular vectors stay, and a grid holds the rest (Li et al., 2025)."""

from collections.abc import Iterator

import torch

from nla.matrix.objective import Norms, Objective
from nla.methods.rounded_plus_low_rank import Pair, RoundedPlusLowRank
from nla.methods.rtn import RTN
from nla.methods.svd import SVD


class SVDQuant(RoundedPlusLowRank):
    """L R^T = truncated SVD of W and Q = W - L R^T rounded to nearest; then L R^T of W - Q, until the outputs' error rises.

    Activations are not quantised here, and weights are not smoothed before.

    Args:
        sequential: errors are those for inputs that passed through the compressed earlier layers.
    """

    needs = frozenset({"gram"})

    def __init__(self, rank: int | None, iterations: int, sequential: bool) -> None:
        super().__init__(rank, iterations, RTN("uniform"), SVD())
        self.sequential = sequential

    def objective(self, norms: Norms) -> Objective:
        return norms.outputs

    def pairs(self, objective: Objective, planned: Pair, generator: torch.Generator) -> Iterator[Pair]:
        return self.factors_first(Objective(objective.weight), planned, generator)
