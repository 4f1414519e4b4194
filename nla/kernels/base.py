"""The contract of a kernel, and the two ways to compute with one: as thin factors, or tile by tile."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from nla.machine.errors import require_integer
from nla.matrix.objective import Objective
from nla.matrix.spectrum import spectrum_flops
from nla.matrix.triplets import Triplets, triplet_size


@dataclass(frozen=True)
class Start:
    """Where a fit begins. `optimum` is the kernel's smallest possible relative squared error, where theory knows it."""

    triplets: Triplets
    optimum: float | None = None


class Kernel(ABC):
    """W'[i, j] = sum_l mu_l k(A[i, l], B[j, l]). Stateless: it holds hyper-parameters only.

    Args:
        r: columns of a triplet.
        min_h: where a matrix's budget holds fewer triplets than this, r is lowered for it.

    Attributes:
        exact_apply: whether apply() is a closed form, or goes tile by tile.
        has_self_terms: whether sum_l mu_l |A_il|^2 and sum_l mu_l |B_jl|^2 are summands of the matrix.
    """

    exact_apply: bool
    has_self_terms = False

    def __init__(self, r: int = 1, min_h: int = 1) -> None:
        require_integer("kernel.r", r, 1)
        require_integer("kernel.min_h", min_h, 1)
        self.r = r
        self.min_h = min_h

    @property
    def name(self) -> str:
        return type(self).__name__.lower()

    def size(self, out_features: int, in_features: int, n_params: int) -> tuple[int, int]:
        """(h, r) that a budget of n_params buys; h = 0 if it does not buy one triplet.

        Where r must be lowered, it is the one that leaves the least of the budget unspent.
        """

        def triplets(r: int) -> int:
            return n_params // triplet_size(out_features, in_features, r)

        if triplets(self.r) >= self.min_h:
            return triplets(self.r), self.r
        r = max((r for r in range(1, self.r + 1) if triplets(r) >= self.min_h or r == 1), key=lambda r: (triplets(r) * r, r))
        return triplets(r), r

    @abstractmethod
    def dense(self, t: Triplets) -> Tensor:
        """The matrix itself: (out, in)."""

    @abstractmethod
    def apply(self, t: Triplets, x: Tensor) -> Tensor:
        """x @ dense(t).T without ever holding dense(t): (..., in) -> (..., out)."""

    def canonical(self, t: Triplets) -> Triplets:
        """Triplets of the same matrix whose numbers lose least when they are rounded."""
        return t

    def balanced(self, t: Triplets) -> Triplets:
        """Triplets of the same matrix in the gauge that is best to train in: A, B and mu alike in size."""
        return t

    @abstractmethod
    def squared_error(self, t: Triplets, objective: Objective, products: torch.dtype) -> tuple[Tensor, Triplets]:
        """||(dense(t) - W) S||^2 and its gradient with respect to A, B, mu.

        `products` is the type that large matrix products are computed in.
        """

    @abstractmethod
    def rank_bound(self, h: int, r: int) -> int | None:
        """The largest rank that dense() can have, or None where the kernel does not bound it."""

    @abstractmethod
    def forward_flops(self, out_features: int, in_features: int, h: int, r: int, tokens: int) -> int:
        """Floating-point operations of apply() on `tokens` rows."""

    @abstractmethod
    def fit_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        """Floating-point operations of one squared_error() in the plain norm."""

    @abstractmethod
    def weighting_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        """How many more there are in a weighted norm."""

    def warm_start_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        """Floating-point operations of warm_start(), to first order."""
        return spectrum_flops(out_features, in_features)

    @abstractmethod
    def random_start(self, out_features: int, in_features: int, h: int, r: int, generator: torch.Generator) -> Triplets:
        """Random triplets whose matrix has entries of about unit size (the paper's start)."""

    @abstractmethod
    def warm_start(self, objective: Objective, h: int, r: int, generator: torch.Generator) -> Start:
        """Triplets made from singular vectors in the objective's norm."""


def random_like(kernel: Kernel, weight: Tensor, h: int, r: int, generator: torch.Generator) -> Triplets:
    """A random start for a weight (out, in), of its type and on its device."""
    m, n = weight.shape
    return kernel.random_start(m, n, h, r, generator).map(lambda p: p.to(weight))
