"""Triplets whose A and B are rounded to the values of a codebook: the form in which they are fitted and trained."""

import torch
from torch import Tensor, nn

from nla.codes.codebook import Codebook, codebook_of
from nla.kernels.factored import FactoredKernel
from nla.matrix.triplets import Triplets
from nla.terms.base import Factors, Stored, Term
from nla.terms.coded import CodebookTerm, CodedTerm

PARTS = ("A", "B", "mu", "rows", "columns")


class RoundedTerm(CodebookTerm):
    """W'[i, j] = rows_i columns_j sum_l mu_l k(A[i, l], B[j, l]), with A and B rounded to the values of a codebook.

    A and B are kept unrounded, so that small steps add up. Gradients pass the rounding unchanged. `packed` gives the term of
    the codes, which has the same matrix.

    Args:
        rows, columns: (out,) and (in,), scales.
    """

    A: nn.Parameter
    B: nn.Parameter
    mu: nn.Parameter
    rows: nn.Parameter
    columns: nn.Parameter

    def __init__(self, kernel: FactoredKernel, codebook: Codebook, triplets: Triplets, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.kernel, self.codebook, self.h, self.r = kernel, codebook, triplets.h, triplets.r
        self.out_features, self.in_features = triplets.out_features, triplets.in_features
        for part, tensor in zip(PARTS, (*triplets.tensors, rows, columns), strict=True):
            # a fused optimiser needs its moments in the same memory order, and checkpoints restore them row by row
            setattr(self, part, nn.Parameter(tensor.detach().contiguous()))

    @classmethod
    def empty(  # type: ignore[override]
        cls,
        kernel: FactoredKernel,
        kind: str,
        width: int,
        out_features: int,
        in_features: int,
        h: int,
        r: int,
        dtype: torch.dtype,
    ) -> "RoundedTerm":
        sizes = ((out_features, h, r), (in_features, h, r), (h,), (out_features,), (in_features,))
        A, B, mu, rows, columns = (torch.empty(size, dtype=dtype, device="meta") for size in sizes)
        return cls(kernel, codebook_of(kind, width), Triplets(A, B, mu), rows, columns)

    @property
    def triplets(self) -> Triplets:
        """The rounded triplets."""
        return Triplets(self.codebook.rounded(self.A), self.codebook.rounded(self.B), self.mu)

    def factors(self) -> Factors:
        left, right = self.kernel.factors(self.triplets)
        return left * self.rows[:, None], right * self.columns[:, None]

    def forward(self, x: Tensor) -> Tensor:
        left, right = self.factors()
        return (x @ right) @ left.T  # (..., in) -> (..., k) -> (..., out)

    def dense(self) -> Tensor:
        left, right = self.factors()
        return left @ right.T

    def stored(self) -> list[Stored]:
        return self.packed().stored()

    def scaled(self, factor: float) -> "RoundedTerm":
        return self.with_numbers(self.A, self.B, self.mu * factor, self.rows, self.columns)

    def with_numbers(self, A: Tensor, B: Tensor, mu: Tensor, rows: Tensor, columns: Tensor) -> "RoundedTerm":
        """A term of the same kernel and codebook with these numbers."""
        return RoundedTerm(self.kernel, self.codebook, Triplets(A, B, mu), rows, columns)

    def as_stored(self, dtype: torch.dtype) -> Term:
        return self.packed().as_stored(dtype)

    def packed(self) -> CodedTerm:
        return CodedTerm.of(self.kernel, self.codebook, Triplets(self.A, self.B, self.mu), self.rows, self.columns)
