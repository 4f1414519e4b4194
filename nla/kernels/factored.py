"""Kernels whose matrix is a product of two thin factors."""

from abc import abstractmethod

import torch
from torch import Tensor
from torch.nn.functional import linear

from nla.kernels.base import Kernel
from nla.matrix.objective import Objective
from nla.matrix.parts import widen
from nla.matrix.triplets import Triplets


class FactoredKernel(Kernel):
    """A kernel whose matrix is L(A, mu) @ R(B, mu).T with factors L and R.

    apply() multiplies by one factor after the other, or by the product of both, whichever takes fewer operations. Of a few
    tokens, or if the factors are thin, that is the first, which needs no (out, in) matrix.
    """

    @abstractmethod
    def factors(self, t: Triplets) -> tuple[Tensor, Tensor]:
        """The factors L (out, k) and R (in, k), with k = columns(h, r)."""

    @abstractmethod
    def columns(self, h: int, r: int) -> int:
        """The number of columns of L and R."""

    def features(self, numbers: Tensor) -> tuple[Tensor, Tensor] | None:
        """Features f(a) and g(b) of numbers (k,), each (k, w), such that k(a, b) = f(a) . g(b) for r = 1; None if unknown."""
        return None

    def factors_to_round(self, t: Triplets) -> tuple[Tensor, Tensor]:
        """Factors of the same matrix whose columns do not cancel, so that they can be rounded to 16 bits."""
        return self.factors(t)

    def mixed_start(self, objective: Objective, h: int, r: int, generator: torch.Generator) -> Triplets:
        """A start for triplets that get scales, and may be rounded to a few bits. The default is the warm start.

        If one triplet carried most of the matrix, as the first of a truncated SVD often does, its rounding error would be
        larger than all others together.
        """
        return self.warm_start(objective, h, r, generator)[0]

    def rank_bound(self, h: int, r: int) -> int:
        return self.columns(h, r)

    def dense(self, t: Triplets) -> Tensor:
        """Computed in fp32 at least: terms of the sum may cancel."""
        left, right = self.factors(t.map(widen))
        return (left @ right.T).to(t.mu.dtype)

    def apply(self, t: Triplets, x: Tensor) -> Tensor:
        left, right = self.factors(t)
        one_by_one, product = apply_flops(t.out_features, t.in_features, left.shape[1], x[..., 0].numel())
        return (x @ right) @ left.T if one_by_one <= product else linear(x, left @ right.T)

    def forward_flops(self, out_features: int, in_features: int, h: int, r: int, tokens: int) -> int:
        return min(apply_flops(out_features, in_features, self.columns(h, r), tokens))

    def dense_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        return 2 * out_features * in_features * self.columns(h, r)

    def fit_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        return 6 * out_features * in_features * self.columns(h, r)

    def weighting_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        return 4 * in_features * in_features * self.columns(h, r)


def apply_flops(out_features: int, in_features: int, columns: int, tokens: int) -> tuple[int, int]:
    """Operations of `tokens` rows times factors of so many columns: one after the other, and times their product."""
    size = out_features * in_features
    return 2 * tokens * (out_features + in_features) * columns, 2 * size * (columns + tokens)


class CoarseToFine(FactoredKernel):
    """A kernel whose fit with scales begins with a fit of a simpler kernel.

    Attributes:
        coarse: the simpler kernel. Its triplets have the same shapes.
    """

    coarse: FactoredKernel

    @abstractmethod
    def finer(self, t: Triplets, rest: Objective, generator: torch.Generator) -> Triplets:
        """The start of the fit: from fitted triplets of `coarse`, and from what these leave of the matrix."""
