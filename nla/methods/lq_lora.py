"""LQ-LoRA: linear factors and a grid, each fitted to what the other leaves (Guo et al., 2024)."""

from nla.machine.errors import require_choice
from nla.matrix.objective import Norms, Objective
from nla.methods.rounded_plus_low_rank import RoundedPlusLowRank
from nla.methods.rtn import RTN
from nla.methods.svd import SVD


class LQLoRA(RoundedPlusLowRank):
    """L R^T = the best matrix of its rank for W - Q (at first Q = 0), then Q = W - L R^T rounded, until the error rises.

    Args:
        loss: `weight` (||W' - W||^2) or `inputs` (each input counts by its mean square over the calibration tokens).
        levels: of grids of 4 bits, `nf4` (the paper's) or `uniform`.

    Raises:
        UserError: a value is not known.
    """

    pairs = RoundedPlusLowRank.factors_first

    def __init__(self, rank: int | None, iterations: int, loss: str, levels: str) -> None:
        super().__init__(rank, iterations, RTN(levels), SVD())
        require_choice("method.loss", loss, ["weight", "inputs"])
        self.needs = frozenset({"gram"} if loss == "inputs" else ())

    def objective(self, norms: Norms) -> Objective:
        gram = norms.statistics.gram
        if not self.needs or gram is None:
            return norms.plain
        squares = gram.diagonal().double().clamp(min=0)
        least = 1e-6 * squares.mean().clamp(min=1e-30)  # an input that is never on counts little
        return norms.scaled((squares + least).sqrt())
