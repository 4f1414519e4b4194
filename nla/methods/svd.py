"""Truncated SVD, the simplest baseline. FWSVD, ASVD and SVD-LLM are truncated SVD in weighted norms."""

from collections.abc import Sequence

import torch

from nla.kernels.linear import Linear
from nla.matrix.objective import Objective
from nla.matrix.spectrum import spectrum_flops
from nla.matrix.triplets import Triplets
from nla.methods.base import MatrixMethod, Shape
from nla.solvers.base import Start
from nla.storage.base import Float
from nla.terms.base import Term
from nla.terms.kernel_term import KernelTerm


class SVD(MatrixMethod):
    """W' = U_R U_R^T W, where U_R are the first R left singular vectors of W S. S is the identity here.

    No matrix of rank R has a smaller ||(W' - W) S||. The term is the linear kernel with h = R triplets of r = 1. A are the
    vectors U_R. B are the columns of W^T U_R, each divided by a power of two that brings its norm near 1, with the rest in mu:
    the singular values of W S would grow with the number of tokens, out of the range of 16 bits.
    """

    def __init__(self) -> None:
        self.kernel, self.storage = Linear(r=1), Float()

    def plan_matrix(self, out_features: int, in_features: int, bits: int, dtype: torch.dtype) -> KernelTerm:
        return self.storage.plan(self.kernel, out_features, in_features, bits, dtype)

    def bits_of(self, out_features: int, in_features: int, rank: int, dtype: torch.dtype) -> int:
        """Bits of factors of this rank."""
        return rank * self.storage.least_bits(out_features, in_features, dtype)

    def least_bits(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        return sum(self.storage.least_bits(m, n, dtype) for m, n in shapes)

    def start(self, objective: Objective, planned: Term, generator: torch.Generator) -> Start:
        assert isinstance(planned, KernelTerm)
        h = planned.triplets.h
        left, s, right = objective.spectrum.truncated(h)
        size = torch.linalg.vector_norm(right, dim=0)
        size = torch.where(size > 0, size.log2().round().exp2(), 1.0)  # a power of two, so that no digit changes
        left, right, mu = (p.to(objective.weight.dtype) for p in (left, right / size, s * size))
        term = KernelTerm(self.kernel, Triplets(left[:, :, None], right[:, :, None], mu))
        return Start(term, objective.spectrum.tail(h))

    def start_flops(self, term: Term) -> int:
        return spectrum_flops(term.out_features, term.in_features)
