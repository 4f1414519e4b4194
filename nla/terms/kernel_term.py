"""The paper's term: triplets, and the kernel that makes a matrix of them."""

from typing import Any

import torch
from torch import Tensor, nn

from nla.kernels.base import Kernel
from nla.kernels.factored import FactoredKernel
from nla.kernels.linear import Linear
from nla.machine.device import type_name
from nla.matrix.triplets import Triplets
from nla.terms.base import Factors, Stored, Term, class_path

TENSORS = ("A", "B", "mu")


class KernelTerm(Term):
    """W'[i, j] = sum_l mu_l k(A[i, l], B[j, l]), with A, B and mu as trainable parameters.

    A triplet with mu = 0 is masked: it adds nothing to the matrix, is not counted, and `as_stored` drops it.
    """

    A: nn.Parameter  # (out, h, r)
    B: nn.Parameter  # (in, h, r)
    mu: nn.Parameter  # (h,)

    def __init__(self, kernel: Kernel, triplets: Triplets) -> None:
        super().__init__()
        self.kernel = kernel
        self.out_features, self.in_features = triplets.out_features, triplets.in_features
        self.hold(triplets)

    @classmethod
    def empty(  # type: ignore[override]
        cls, kernel: Kernel, out_features: int, in_features: int, h: int, r: int, dtype: torch.dtype
    ) -> "KernelTerm":
        """A term with A and B on the meta device, where tensors have no values. mu is 1, so that all triplets count."""
        A, B = (torch.empty(n, h, r, dtype=dtype, device="meta") for n in (out_features, in_features))
        return cls(kernel, Triplets(A, B, torch.ones(h, dtype=dtype)))

    def hold(self, triplets: Triplets) -> None:
        """Replace the parameters A, B and mu by these triplets.

        They are held row by row, as they come back from a file: sums in another order would differ in their last bits.
        """
        self.A, self.B, self.mu = (nn.Parameter(p.detach().contiguous()) for p in triplets.tensors)

    @property
    def triplets(self) -> Triplets:
        return Triplets(self.A, self.B, self.mu)

    @property
    def h(self) -> int:
        return self.A.shape[1]

    @property
    def r(self) -> int:
        return self.A.shape[2]

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel.apply(self.triplets, x)  # (..., in) -> (..., out)

    def dense(self) -> Tensor:
        return self.kernel.dense(self.triplets)  # (out, in)

    def factors(self) -> Factors | None:
        return self.kernel.factors(self.triplets) if isinstance(self.kernel, FactoredKernel) else None

    def wide_factors(self) -> Factors | None:
        if not isinstance(self.kernel, FactoredKernel):
            return None
        return self.kernel.factors_to_round(self.triplets.map(lambda p: p.detach().double()))

    def stored(self) -> list[Stored]:
        t, h = self.triplets, int((self.mu != 0).sum())
        numbers = (h * t.r * t.out_features, h * t.r * t.in_features, h)
        return [Stored(p, n, n * 8 * p.element_size()) for p, n in zip(t.tensors, numbers, strict=True)]

    def config(self) -> dict[str, Any]:
        t = self.triplets
        return {
            "class": class_path(self),
            "kernel": {"class": class_path(self.kernel), **self.kernel.settings()},
            "out_features": t.out_features,
            "in_features": t.in_features,
            "h": t.h,
            "r": t.r,
            "dtype": type_name(t.mu),
        }

    def describe(self) -> str:
        return f"{self.kernel.name} h={self.triplets.h} r={self.triplets.r}"

    def forward_flops(self, tokens: int) -> int:
        t = self.triplets
        return self.kernel.forward_flops(t.out_features, t.in_features, t.h, t.r, tokens)

    def dense_flops(self) -> int:
        t = self.triplets
        return self.kernel.dense_flops(t.out_features, t.in_features, t.h, t.r)

    def rank_bound(self) -> int | None:
        return self.kernel.rank_bound(self.triplets.h, self.triplets.r)

    def scaled(self, factor: float) -> "KernelTerm":
        return KernelTerm(self.kernel, self.triplets.scaled(factor))

    def as_stored(self, dtype: torch.dtype) -> "KernelTerm":
        t = self.kernel.canonical(self.triplets)
        return KernelTerm(self.kernel, t.prune(t.mu != 0).map(lambda p: p.to(dtype)))


def nothing(out_features: int, in_features: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> KernelTerm:
    """The term of a matrix of zeros, or of one whose bits buy nothing. It stores no number."""
    A, B, mu = (torch.empty(shape, dtype=dtype, device=device) for shape in ((out_features, 0, 1), (in_features, 0, 1), (0,)))
    return KernelTerm(Linear(), Triplets(A, B, mu))
