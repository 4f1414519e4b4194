"""The base class of kernels. A kernel must define its formula `entry`; all its other methods have defaults."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor

from nla.kernels.precision import without_autocast
from nla.kernels.tiled import TileByTile, matrix_rows, panels
from nla.machine.errors import require_integer
from nla.matrix.objective import Objective
from nla.matrix.triplets import Triplets, alternating_signs, triplet_size

TRAINING_RATE = 4e-3  # default learning rate of retraining, relative to the root mean square of a tensor
PAIR_FLOPS = 8  # estimated operations of one evaluation of k, per pair of rows and column
SAMPLED_PAIRS = 4096  # random pairs of rows from which the standard deviation of k is estimated


class Constraint(Protocol):
    """A surface on which retraining keeps the triplets of a term (see `nla.kernels.self_term_surface`)."""

    def project(self, gradients: Mapping[str, Tensor]) -> None:
        """Remove from the gradients of A, B and mu, in place, the component that leads away from the surface."""

    def retract(self) -> None:
        """Move the triplets back to the surface, in place, after a step along its tangent."""


class Kernel(ABC):
    """A formula k that makes a matrix W' (out, in) of h triplets: W'[i, j] = sum_l mu_l k(A[i, l], B[j, l]).

    Triplet l is A[:, l] (out, r), B[:, l] (in, r) and the number mu_l. A kernel must define `entry`, its formula k. All other
    methods have defaults that use `entry`. A kernel overrides them to be faster or exact. It stores no triplets.

    Args:
        r: columns of A and of B per triplet.
        min_h: if the budget of a matrix allows fewer triplets than this, r is lowered for that matrix.

    Attributes:
        training_rate: learning rate of retraining, relative to the root mean square of a tensor's numbers.
        fitting_rate: learning rate of fits, relative to the solver's.
    """

    training_rate = TRAINING_RATE
    fitting_rate = 1.0

    def __init__(self, r: int = 1, min_h: int = 1) -> None:
        require_integer("kernel.r", r, 1)
        require_integer("kernel.min_h", min_h, 1)
        self.r = r
        self.min_h = min_h

    @property
    def name(self) -> str:
        """The kernel's name in tables."""
        return type(self).__name__.lower()

    def settings(self) -> dict[str, Any]:
        """The constructor arguments of this kernel."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    @abstractmethod
    def entry(self, a: Tensor, b: Tensor) -> Tensor:
        """k(a, b) for pairs of rows, written as in the kernel's paper: (..., r), (..., r) -> (...)."""

    def pairs(self, a: Tensor, b: Tensor) -> Tensor:
        """k of every row of A with every row of B: (rows, h, r), (in, h, r) -> (rows, in, h)."""
        return self.entry(a[:, None], b[None])

    def pairs_gradient(self, a: Tensor, b: Tensor, d: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k of all pairs (rows, in, h), and the gradients of sum_ijl d[i, j] k[i, j, l] with respect to a and b.

        d is (rows, in). The default uses autograd.
        """
        with torch.enable_grad():
            a, b = a.detach().requires_grad_(), b.detach().requires_grad_()
            k = self.pairs(a, b)
            d_a, d_b = torch.autograd.grad(k, (a, b), d[:, :, None].expand_as(k))
        return k.detach(), d_a, d_b

    def dense(self, t: Triplets) -> Tensor:
        """The matrix W' (out, in)."""
        return torch.cat([matrix_rows(self, t, panel) for panel in panels(t)])

    def apply(self, t: Triplets, x: Tensor) -> Tensor:
        """x @ dense(t).T, without the whole matrix in memory: (..., in) -> (..., out)."""
        return without_autocast(partial(TileByTile.apply, self), t, x)

    def canonical(self, t: Triplets) -> Triplets:
        """Triplets of the same matrix that lose the least precision when they are rounded to the model's type."""
        return t

    def balanced(self, t: Triplets) -> Triplets:
        """Triplets of the same matrix with A, B and mu of similar size, from which retraining starts."""
        return t

    def with_size(self, t: Triplets, size: float) -> Triplets | None:
        """Triplets of the same matrix in which each A_l and B_l has a root mean square near `size`; None (the default) if the
        kernel's formula does not allow it."""
        return None

    def constraint(self, t: Triplets, trained: frozenset[str]) -> Constraint | None:
        """The surface through the current triplets on which retraining must stay, or None (the default).

        Args:
            t: the triplets that the optimiser changes in place.
            trained: which of A, B and mu it changes.
        """
        return None

    def rank_bound(self, h: int, r: int) -> int | None:
        """The largest rank that dense() can have, or None if the kernel does not bound it."""
        return None

    def random_start(self, out_features: int, in_features: int, h: int, r: int, generator: torch.Generator) -> Triplets:
        """Random triplets whose matrix has entries of about unit size (the paper's start).

        A and B are normal with variance 1 / r. mu has alternating signs and is divided by the standard deviation of k.
        """
        A = torch.randn(out_features, h, r, generator=generator) / r**0.5
        B = torch.randn(in_features, h, r, generator=generator) / r**0.5
        a, b = torch.randn(2, SAMPLED_PAIRS, r, generator=generator) / r**0.5
        spread = float(self.entry(a, b).std())
        return Triplets(A, B, alternating_signs(h, A) / (max(spread, 1e-3) * h**0.5))

    def warm_start(self, objective: Objective, h: int, r: int, generator: torch.Generator) -> tuple[Triplets, float | None]:
        """A warm start: triplets computed from the matrix, for example from its singular vectors. The default is random.

        Returns:
            the triplets, and the smallest relative squared error that h triplets can reach, or None if it is not known.
        """
        return random_like(self, objective.weight, h, r, generator), None

    def warm_start_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        """Floating-point operations of warm_start(), to first order."""
        return 0

    def forward_flops(self, out_features: int, in_features: int, h: int, r: int, tokens: int) -> int:
        """Floating-point operations of apply() for an x of `tokens` rows."""
        return self.dense_flops(out_features, in_features, h, r) + 2 * out_features * in_features * tokens

    def dense_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        """Floating-point operations of dense()."""
        return PAIR_FLOPS * out_features * in_features * h * r

    def fit_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        """Floating-point operations of the squared error and its gradient, in the plain norm."""
        return 4 * PAIR_FLOPS * out_features * in_features * h * r

    def weighting_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        """Floating-point operations that a weighted norm adds to fit_flops()."""
        return 2 * out_features * in_features * in_features

    def size(self, out_features: int, in_features: int, n_params: int) -> tuple[int, int]:
        """The size (h, r) that n_params parameters allow; h = 0 if they do not allow one triplet.

        If r must be lowered, the r that leaves the fewest parameters unspent is chosen.
        """

        def triplets(r: int) -> int:
            return n_params // triplet_size(out_features, in_features, r)

        if triplets(self.r) >= self.min_h:
            return triplets(self.r), self.r
        most = min(self.r, n_params // (out_features + in_features))  # a larger r allows no triplet
        r = max((r for r in range(1, most + 1) if triplets(r) >= self.min_h), key=lambda r: (triplets(r) * r, r), default=1)
        return triplets(r), r


def random_like(kernel: Kernel, weight: Tensor, h: int, r: int, generator: torch.Generator) -> Triplets:
    """A random start for a weight (out, in), with its type and device."""
    m, n = weight.shape
    return kernel.random_start(m, n, h, r, generator).map(lambda p: p.to(weight))
