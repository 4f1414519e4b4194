"""SVD-LLM: truncation-aware SVD of the whitened weight (Wang et al., 2025)."""

from nla.matrix.objective import Norms, Objective
from nla.methods.svd import SVD
from nla.terms.base import Term


class SVDLLM(SVD):
    """SVD in the norm ||(W' - W) L||, where X^T X = L L^T is the Gram matrix of the calibration tokens X.

    No matrix of its rank changes the layer's outputs on these tokens less.

    Args:
        sequential: each block is whitened by inputs that passed through the compressed earlier blocks.
    """

    needs = frozenset({"gram"})

    def __init__(self, sequential: bool) -> None:
        super().__init__()
        self.sequential = sequential

    def objective(self, norms: Norms) -> Objective:
        return norms.outputs

    def start_flops(self, term: Term) -> int:
        whiten = term.in_features**3 // 3 + 2 * term.out_features * term.in_features**2
        return whiten + super().start_flops(term)
