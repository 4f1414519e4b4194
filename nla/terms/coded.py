"""Triplets whose A and B are stored as codes of a few bits, with scales of rows and columns."""

from typing import Any

import torch
from torch import Tensor, nn

from nla.codes.codebook import Codebook, codebook_of, kind_of
from nla.codes.packed import packed, packed_width, unpacked
from nla.kernels.factored import FactoredKernel, apply_flops
from nla.machine.device import type_name
from nla.matrix.triplets import Triplets
from nla.terms.base import Factors, Stored, Term, class_path

CHUNK = 64  # triplets that a forward pass unpacks at a time


class CodebookTerm(Term):
    """What triplets of a codebook have in common, whether they are packed or in training."""

    kernel: FactoredKernel
    codebook: Codebook
    mu: nn.Parameter
    h: int
    r: int

    def config(self) -> dict[str, Any]:
        return {
            "class": class_path(self),
            "kernel": {"class": class_path(self.kernel), **self.kernel.settings()},
            "kind": kind_of(self.codebook),
            "width": self.codebook.width,
            "out_features": self.out_features,
            "in_features": self.in_features,
            "h": self.h,
            "r": self.r,
            "dtype": type_name(self.mu),
        }

    def describe(self) -> str:
        return f"{self.kernel.name} {self.codebook.name} h={self.h} r={self.r}"

    def forward_flops(self, tokens: int) -> int:
        """Operations of one factor after the other: codes are unpacked by parts, so that the factors are never multiplied."""
        return apply_flops(self.out_features, self.in_features, self.kernel.columns(self.h, self.r), tokens)[0]

    def dense_flops(self) -> int:
        return self.kernel.dense_flops(self.out_features, self.in_features, self.h, self.r)

    def rank_bound(self) -> int:
        return self.kernel.rank_bound(self.h, self.r)


class CodedTerm(CodebookTerm):
    """W'[i, j] = rows_i columns_j sum_l mu_l k(A[i, l], B[j, l]), with A and B as packed codes of a codebook.

    Args:
        A, B: (h r, packed_width(out, width)) and (h r, packed_width(in, width)) uint8, a row of codes for each column.
        mu: (h,).
        rows, columns: (out,) and (in,), scales.
    """

    A: Tensor
    B: Tensor

    def __init__(
        self,
        kernel: FactoredKernel,
        codebook: Codebook,
        r: int,
        A: Tensor,
        B: Tensor,
        mu: Tensor,
        rows: Tensor,
        columns: Tensor,
    ) -> None:
        super().__init__()
        self.kernel, self.codebook, self.h, self.r = kernel, codebook, len(mu), r
        self.out_features, self.in_features = len(rows), len(columns)
        self.register_buffer("A", A)
        self.register_buffer("B", B)
        self.mu, self.rows, self.columns = (nn.Parameter(p.detach()) for p in (mu, rows, columns))

    @classmethod
    def of(cls, kernel: FactoredKernel, codebook: Codebook, triplets: Triplets, rows: Tensor, columns: Tensor) -> "CodedTerm":
        """The term of the values nearest to A and B of these triplets."""
        A, B = (packed(codebook.nearest(p.detach()).flatten(1).T, codebook.width) for p in (triplets.A, triplets.B))
        return cls(kernel, codebook, triplets.r, A, B, triplets.mu, rows, columns)

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
    ) -> "CodedTerm":
        sides = (out_features, in_features)
        A, B = (torch.empty(h * r, packed_width(n, width), dtype=torch.uint8, device="meta") for n in sides)
        mu, rows, columns = (torch.empty(n, dtype=dtype, device="meta") for n in (h, *sides))
        return cls(kernel, codebook_of(kind, width), r, A, B, mu, rows, columns)

    def triplets(self, begin: int = 0, end: int | None = None) -> Triplets:
        """The triplets from `begin` to before `end`, in the type of mu."""
        end = self.h if end is None else end

        def numbers(codes: Tensor, n: int) -> Tensor:
            part = unpacked(codes[begin * self.r : end * self.r], self.codebook.width, n)  # (triplets r, n)
            return self.codebook.values(part).to(self.mu.dtype).T.unflatten(1, (end - begin, self.r))

        return Triplets(numbers(self.A, self.out_features), numbers(self.B, self.in_features), self.mu[begin:end])

    def factors(self) -> Factors:
        return self.factors_of(self.triplets())

    def factors_of(self, triplets: Triplets) -> Factors:
        """Factors (out, k) and (in, k) of the part of the matrix that these of the term's triplets make."""
        left, right = self.kernel.factors(triplets)
        return left * self.rows[:, None], right * self.columns[:, None]

    def wide_factors(self) -> Factors:
        left, right = self.kernel.factors_to_round(self.triplets().map(lambda p: p.detach().double()))
        return left * self.rows.detach()[:, None], right * self.columns.detach()[:, None]

    def forward(self, x: Tensor) -> Tensor:
        # summed in fp32: rounded after each part, a sum in bf16 has twice the error of a single product
        y = x.new_zeros(*x.shape[:-1], self.out_features, dtype=torch.promote_types(x.dtype, torch.float32))
        for begin in range(0, self.h, CHUNK):
            left, right = self.factors_of(self.triplets(begin, min(begin + CHUNK, self.h)))
            y += (x @ right) @ left.T  # (..., in) -> (..., k) -> (..., out)
        return y.to(x.dtype)

    def dense(self) -> Tensor:
        left, right = self.factors()
        return left @ right.T

    def stored(self) -> list[Stored]:
        if not self.h:
            return []  # the matrix is zero
        sides = ((self.A, self.out_features), (self.B, self.in_features))
        codes = [Stored(p, n * self.h * self.r, 8 * p.numel()) for p, n in sides]
        return codes + Stored.all_of(self.mu, self.rows, self.columns)

    def scaled(self, factor: float) -> "CodedTerm":
        return self.with_numbers(self.mu * factor, self.rows, self.columns)

    def as_stored(self, dtype: torch.dtype) -> "CodedTerm":
        return self.with_numbers(self.mu.to(dtype), self.rows.to(dtype), self.columns.to(dtype))

    def with_numbers(self, mu: Tensor, rows: Tensor, columns: Tensor) -> "CodedTerm":
        """The same codes with other scales."""
        return CodedTerm(self.kernel, self.codebook, self.r, self.A, self.B, mu, rows, columns)

    def trainable(self) -> Term:
        from nla.terms.rounded import RoundedTerm

        return RoundedTerm(self.kernel, self.codebook, self.triplets(), self.rows, self.columns)


def coded_size(out_features: int, in_features: int, r: int, width: int, bits: int, number: int) -> int:
    """The number of triplets h that `bits` allow, or 0, if a number in the model's type takes `number` bits."""
    triplet = 8 * r * (packed_width(out_features, width) + packed_width(in_features, width)) + number
    scales = number * (out_features + in_features)
    return max(0, bits - scales) // triplet
