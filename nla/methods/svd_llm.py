"""SVD-LLM: truncation-aware SVD of the whitened weight (Wang et al., 2025)."""

from nla.matrix.objective import Norms, Objective
from nla.methods.svd import SVD
from nla.terms.base import Term


class SVDLLM(SVD):
    """S = L with X^T X = L L^T: the matrix of its rank that changes the layer's outputs least, over the calibration tokens.

    Args:
        sequential: later blocks are whitened by what the compressed earlier blocks make of the calibration text.
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
