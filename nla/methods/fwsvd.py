"""FWSVD: SVD weighted by the Fisher information (Hsu et al., 2022)."""

import torch

from nla.matrix.objective import Norms, Objective
from nla.methods.svd import SVD


class FWSVD(SVD):
    """S = diag(sqrt(F_j)), F_j the Fisher information of all weights that read input j: the paper's sum over a row of W^T.

    Its inverse is not needed (see WeightedSpectrum): an input without information is simply not looked at.
    """

    needs = frozenset({"fisher"})

    def objective(self, norms: Norms) -> Objective:
        fisher = norms.statistics.fisher
        assert fisher is not None
        if not bool(fisher.any()):
            return norms.scaled(torch.ones_like(fisher), "fisher=0")
        return norms.scaled(fisher.double().sqrt())
