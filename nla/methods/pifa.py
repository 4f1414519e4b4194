"""PIFA: SVD-LLM's matrices of a higher rank, stored by some rows and the coefficients of the others (Zhao et al., 2025)."""

from bisect import bisect_right
from collections.abc import Sequence

import torch

from nla.matrix.objective import Objective
from nla.matrix.spectrum import spectrum_flops
from nla.methods.base import MatrixMethod, Shape
from nla.methods.svd_llm import SVDLLM
from nla.solvers.base import Start
from nla.storage.base import Float
from nla.terms.base import Term
from nla.terms.kernel_term import nothing
from nla.terms.pivoted import Pivoted, pivoted

PLACE_BITS = 32  # of the number of a pivot row


class PivotedSVD(MatrixMethod):
    """Truncated SVD with R (out + in - R) numbers, and the places of R rows, for a rank of R."""

    def bits_of(self, out_features: int, in_features: int, rank: int, dtype: torch.dtype) -> int:
        """Bits of a matrix of this rank."""
        return rank * (8 * dtype.itemsize * (out_features + in_features - rank) + PLACE_BITS)

    def plan_matrix(self, out_features: int, in_features: int, bits: int, dtype: torch.dtype) -> Term:
        m, n = out_features, in_features
        rank = bisect_right(range(1, min(m, n) + 1), bits, key=lambda rank: self.bits_of(m, n, rank, dtype))
        return Pivoted.empty(m, n, rank, dtype) if rank else nothing(m, n, dtype)

    def least_bits(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        return sum(self.bits_of(m, n, 1, dtype) for m, n in shapes)

    def start(self, objective: Objective, planned: Term, generator: torch.Generator) -> Start:
        assert isinstance(planned, Pivoted)
        rank = planned.rank_bound()
        left, s, right = objective.spectrum.truncated(rank)
        return Start(pivoted(left * s, right).as_stored(objective.weight.dtype), objective.spectrum.tail(rank))

    def start_flops(self, term: Term) -> int:
        m, rank = term.out_features, term.rank_bound() or 0
        return spectrum_flops(m, term.in_features) + 4 * m * rank**2  # QR with pivoting, and the triangular solution


class PIFA(SVDLLM):
    """SVD-LLM with the rank that its matrix can have if it is stored by pivot rows, see `nla.terms.pivoted`.

    It is the lossless part of MPIFA, without its reconstruction of the factors from samples.

    Args:
        sequential, correction: see SVDLLM.
    """

    def __init__(self, sequential: bool, correction: float) -> None:
        super().__init__(sequential, correction, Float())
        self.factors = PivotedSVD()
