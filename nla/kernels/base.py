"""The contract of a kernel: a kernel is its formula, and everything else has a default."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from nla.kernels.tiled import TileByTile, matrix_rows, panels
from nla.machine.errors import require_integer
from nla.matrix.objective import Objective
from nla.matrix.triplets import Triplets, alternating_signs, triplet_size

TRAINING_RATE = 4e-3  # learning rate of retraining that suits most kernels, relative to the size of a tensor's numbers
PAIR_FLOPS = 8  # an evaluation of k costs about this many operations per pair and column
SAMPLED_PAIRS = 4096  # by which the size of k at random rows is measured


class Constraint(Protocol):
    """A surface that a term's triplets stay on while they are trained, such as fixed self-terms."""

    def project(self, gradients: Mapping[str, Tensor]) -> None:
        """Take from the gradients of A, B and mu, in place, what leads away from the surface."""

    def retract(self) -> None:
        """Move the triplets back to the surface, in place, after a step along its tangent."""


class Kernel(ABC):
    """W'[i, j] = sum_l mu_l k(A[i, l], B[j, l]).

    A kernel must define `entry`, its formula k. All other methods have defaults that are made from it. A kernel overrides
    them to be faster or exact. A kernel holds hyper-parameters only, no triplets.

    Args:
        r: columns of a triplet.
        min_h: where a matrix's budget holds fewer triplets than this, r is lowered for it.

    Attributes:
        training_rate: learning rate of retraining, relative to the root mean square of a tensor's numbers.
    """

    training_rate = TRAINING_RATE

    def __init__(self, r: int = 1, min_h: int = 1) -> None:
        require_integer("kernel.r", r, 1)
        require_integer("kernel.min_h", min_h, 1)
        self.r = r
        self.min_h = min_h

    @property
    def name(self) -> str:
        """The name that tables show."""
        return type(self).__name__.lower()

    def settings(self) -> dict[str, Any]:
        """The arguments by which the same kernel is made again."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    @abstractmethod
    def entry(self, a: Tensor, b: Tensor) -> Tensor:
        """k of pairs of rows, as the formula is written in its paper: (..., r), (..., r) -> (...)."""

    def pairs(self, a: Tensor, b: Tensor) -> Tensor:
        """k of all rows of A with all rows of B: (rows, h, r), (in, h, r) -> (rows, in, h)."""
        return self.entry(a[:, None], b[None])

    def pairs_gradient(self, a: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k of all pairs, and the gradients of sum_ijl d_ij k_ijl for a and b: d is (rows, in). By autograd."""
        with torch.enable_grad():
            a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
            k = self.pairs(a, b)
            d_a, d_b = torch.autograd.grad(k, (a, b), d[:, :, None].expand_as(k))
        return k.detach(), d_a, d_b

    def dense(self, t: Triplets) -> Tensor:
        """The matrix itself: (out, in)."""
        return torch.cat([matrix_rows(self, t, panel) for panel in panels(t)])

    def apply(self, t: Triplets, x: Tensor) -> Tensor:
        """x @ dense(t).T without ever holding dense(t): (..., in) -> (..., out)."""
        return TileByTile.apply(self, x, t.A, t.B, t.mu)

    def canonical(self, t: Triplets) -> Triplets:
        """Triplets of the same matrix whose numbers lose least when they are rounded."""
        return t

    def balanced(self, t: Triplets) -> Triplets:
        """Triplets of the same matrix with A, B and mu alike in size, which is best to train in."""
        return t

    def constraint(self, t: Triplets, trained: frozenset[str]) -> Constraint | None:
        """The surface that retraining must stay on, through the triplets as they are; None: there is none.

        Args:
            t: the numbers that the optimiser moves, changed in place.
            trained: which of A, B and mu it moves.
        """
        return None

    def rank_bound(self, h: int, r: int) -> int | None:
        """The largest rank that dense() can have, or None where the kernel does not bound it."""
        return None

    def random_start(self, out_features: int, in_features: int, h: int, r: int, generator: torch.Generator) -> Triplets:
        """Random triplets whose matrix has entries of about unit size (the paper's start).

        Rows are standard normal over r columns. mu has alternating signs, and its size makes up for that of k.
        """
        A = torch.randn(out_features, h, r, generator=generator) / r**0.5
        B = torch.randn(in_features, h, r, generator=generator) / r**0.5
        a, b = torch.randn(2, SAMPLED_PAIRS, r, generator=generator) / r**0.5
        spread = float(self.entry(a, b).std())
        return Triplets(A, B, alternating_signs(h, A) / (max(spread, 1e-3) * h**0.5))

    def warm_start(self, objective: Objective, h: int, r: int, generator: torch.Generator) -> tuple[Triplets, float | None]:
        """Triplets made from what is known of the matrix, and the smallest relative squared error that any could have.

        The error is None where theory does not know it. By default the triplets are random.
        """
        return random_like(self, objective.weight, h, r, generator), None

    def warm_start_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        """Floating-point operations of warm_start(), to first order."""
        return 0

    def forward_flops(self, out_features: int, in_features: int, h: int, r: int, tokens: int) -> int:
        """Floating-point operations of apply() on `tokens` rows."""
        return out_features * in_features * (PAIR_FLOPS * h * r + 2 * tokens)

    def fit_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        """Floating-point operations of the squared error and its gradient, in the plain norm."""
        return 4 * PAIR_FLOPS * out_features * in_features * h * r

    def weighting_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        """How many more there are in a weighted norm."""
        return 2 * out_features * in_features * in_features

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


def random_like(kernel: Kernel, weight: Tensor, h: int, r: int, generator: torch.Generator) -> Triplets:
    """A random start for a weight (out, in), of its type and on its device."""
    m, n = weight.shape
    return kernel.random_start(m, n, h, r, generator).map(lambda p: p.to(weight))
