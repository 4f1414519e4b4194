"""FWSVD: SVD weighted by the Fisher information (Hsu et al., 2022)."""

import torch

from nla.matrix.objective import Norms, Objective
from nla.methods.svd import SVD


class FWSVD(SVD):
    """SVD in the norm ||(W' - W) S|| with S = diag(sqrt(F_j)).

    F_j is the Fisher information of all weights of input j, the paper's sum over a row of W^T. S is not inverted (see
    WeightedSpectrum), so F_j may be 0: errors at such an input are then ignored.
    """

    needs = frozenset({"fisher"})

    def objective(self, norms: Norms) -> Objective:
        fisher = norms.statistics.fisher
        assert fisher is not None
        if not bool(fisher.any()):
            return norms.scaled(torch.ones_like(fisher), "fisher=0")
        return norms.scaled(fisher.double().sqrt())
