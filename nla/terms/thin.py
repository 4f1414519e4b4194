"""The matrix of a term as the product of two thin matrices."""

import torch
from torch import Tensor

from nla.kernels.factored import FactoredKernel
from nla.terms.base import Term
from nla.terms.coded import CodedTerm
from nla.terms.grid_factors import GridFactors
from nla.terms.kernel_term import KernelTerm
from nla.terms.scaled import Scaled

Factors = tuple[Tensor, Tensor]


def thin_factors(term: Term) -> Factors | None:
    """Factors L (out, k) and R (in, k) in float64 with dense() = L @ R.T, or None if a part of the term has none.

    They can be rounded to a model's type (see `FactoredKernel.factors_to_round`).
    """
    found = [factors_of(leaf) for leaf in term.leaves()]
    known = [factors for factors in found if factors is not None]
    if len(known) < len(found):
        return None
    lefts, rights = zip(*known, strict=True)
    return torch.cat(lefts, 1), torch.cat(rights, 1)


def factors_of(leaf: Term) -> Factors | None:
    """The factors of a term that is no sum."""
    if isinstance(leaf, KernelTerm) and isinstance(leaf.kernel, FactoredKernel):
        return leaf.kernel.factors_to_round(leaf.triplets.map(lambda p: p.detach().double()))
    if isinstance(leaf, CodedTerm):
        left, right = leaf.kernel.factors_to_round(leaf.triplets().map(lambda p: p.detach().double()))
        return left * leaf.rows.detach()[:, None], right * leaf.columns.detach()[:, None]
    if isinstance(leaf, Scaled):
        inner = thin_factors(leaf.inner)
        return inner and (inner[0] * leaf.rows.detach()[:, None], inner[1] * leaf.columns.detach()[:, None])
    if isinstance(leaf, GridFactors):
        return leaf.left.dense().detach().double().T, leaf.right.dense().detach().double().T
    return None
