"""ASVD: SVD weighted by the size of the inputs (Yuan et al., 2023)."""

from nla.machine.errors import require_at_least_zero
from nla.matrix.objective import Norms, Objective
from nla.methods.svd import SVD


class ASVD(SVD):
    """SVD in the norm ||(W' - W) S|| with S = diag(mean|x_j|^alpha + 1e-6), where x_j is input j of the layer.

    Args:
        alpha: 0 is plain SVD; 0.5 is the paper's value.
    """

    needs = frozenset({"magnitude"})

    def __init__(self, alpha: float) -> None:
        super().__init__()
        require_at_least_zero("method.alpha", alpha)
        self.alpha = alpha

    def objective(self, norms: Norms) -> Objective:
        magnitude = norms.statistics.magnitude
        assert magnitude is not None
        return norms.scaled(magnitude.double().pow(self.alpha) + 1e-6)
