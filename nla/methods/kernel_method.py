"""Methods whose term consists of triplets of one kernel."""

from collections.abc import Sequence

import torch

from nla.kernels.base import Kernel
from nla.matrix.triplets import triplet_size
from nla.methods.base import MatrixMethod, Shape
from nla.terms.base import Term
from nla.terms.coded import CodedTerm
from nla.terms.kernel_term import KernelTerm


class KernelMethod(MatrixMethod):
    """A method whose term has as many triplets of one kernel as the bits allow."""

    kernel: Kernel

    def plan_matrix(self, out_features: int, in_features: int, bits: int, dtype: torch.dtype) -> KernelTerm:
        h, r = self.kernel.size(out_features, in_features, bits // (8 * dtype.itemsize))
        return KernelTerm.empty(self.kernel, out_features, in_features, h, r, dtype)

    def least_bits(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        return sum(triplet_size(m, n, 1) for m, n in shapes) * 8 * dtype.itemsize


def triplet_terms(term: Term) -> list[KernelTerm | CodedTerm]:
    """The terms of triplets that a term consists of, at any depth."""
    return [part for part in term.modules() if isinstance(part, KernelTerm | CodedTerm)]


def size(term: Term) -> tuple[int, int, int, int]:
    """(out, in, h, r) of a term of the triplets of one kernel, with or without scales."""
    (triplets,) = triplet_terms(term)
    return triplets.out_features, triplets.in_features, triplets.h, triplets.r
