"""The triplets that a term consists of."""

from nla.terms.base import Term
from nla.terms.coded import CodedTerm
from nla.terms.kernel_term import KernelTerm


def triplet_terms(term: Term) -> list[KernelTerm | CodedTerm]:
    """The terms of triplets that a term consists of, at any depth."""
    return [part for part in term.modules() if isinstance(part, KernelTerm | CodedTerm)]


def size(term: Term) -> tuple[int, int, int, int]:
    """(out, in, h, r) of a term of the triplets of one kernel, with or without scales."""
    (triplets,) = triplet_terms(term)
    return triplets.out_features, triplets.in_features, triplets.h, triplets.r
