"""SVD-LLM: truncation-aware SVD of the whitened weight (Wang et al., 2025)."""

from collections.abc import Sequence

import torch

from nla.matrix.objective import Norms, Objective
from nla.methods.base import MatrixMethod, Shape, require_correction
from nla.methods.packed_svd import svd_with
from nla.solvers.base import Solution, Start
from nla.storage.base import Storage
from nla.terms.base import Term


class SVDLLM(MatrixMethod):
    """SVD in the norm ||(W' - W) L||, where X^T X = L L^T is the Gram matrix of the calibration tokens X.

    No matrix of its rank changes the layer's outputs on these tokens less.

    Args:
        sequential: each layer is whitened by inputs that passed through the compressed earlier layers.
        correction: fraction of the errors of these blocks that is corrected, see `Norms.outputs`.
        storage: of the factors, see `nla.methods.packed_svd`.
    """

    needs = frozenset({"gram"})

    def __init__(self, sequential: bool, correction: float, storage: Storage) -> None:
        require_correction(correction, sequential)
        self.sequential, self.correction = sequential, correction
        self.factors: MatrixMethod = svd_with(storage)

    def objective(self, norms: Norms) -> Objective:
        return norms.outputs

    def plan_matrix(self, out_features: int, in_features: int, bits: int, dtype: torch.dtype) -> Term:
        return self.factors.plan_matrix(out_features, in_features, bits, dtype)

    def least_bits(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        return self.factors.least_bits(shapes, dtype)

    def start(self, objective: Objective, planned: Term, generator: torch.Generator) -> Start:
        return self.factors.start(objective, planned, generator)

    def find(self, objective: Objective, planned: Term, generator: torch.Generator) -> Solution:
        return self.factors.find(objective, planned, generator)

    def start_flops(self, term: Term) -> int:
        whiten = term.in_features**3 // 3 + 2 * term.out_features * term.in_features**2
        return whiten + self.factors.start_flops(term)
