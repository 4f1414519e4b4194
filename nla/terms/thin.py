"""The matrix of a term as the product of two thin matrices."""

import torch
from torch import Tensor

from nla.kernels.factored import FactoredKernel
from nla.terms.base import Term
from nla.terms.kernel_term import KernelTerm


def thin_factors(term: Term) -> tuple[Tensor, Tensor] | None:
    """Factors L (out, k) and R (in, k) in float64 with dense() = L @ R.T, or None if a kernel has none.

    They can be rounded to a model's type (see `FactoredKernel.factors_to_round`).
    """
    lefts, rights = [], []
    for leaf in term.leaves():
        if not isinstance(leaf, KernelTerm) or not isinstance(leaf.kernel, FactoredKernel):
            return None
        left, right = leaf.kernel.factors_to_round(leaf.triplets.map(lambda p: p.detach().double()))
        lefts.append(left)
        rights.append(right)
    return torch.cat(lefts, 1), torch.cat(rights, 1)
