"""Triplets tau_l = {A[:, l, :], mu[l], B[:, l, :]} (NLA): the numbers from which a kernel makes a matrix."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def triplet_size(out_features: int, in_features: int, r: int) -> int:
    """Number of parameters of one triplet: r columns in A and in B, and one mu."""
    return (out_features + in_features) * r + 1


@dataclass(frozen=True)
class Triplets:
    """h triplets: factors A (out, h, r) and B (in, h, r), and coefficients mu (h,). Every kernel is linear in mu.

    Raises:
        ValueError: the shapes do not fit together.
    """

    A: Tensor
    B: Tensor
    mu: Tensor

    def __post_init__(self) -> None:
        if self.A.ndim != 3 or self.B.ndim != 3 or self.mu.ndim != 1:
            raise ValueError(f"A, B, mu must be (out, h, r), (in, h, r), (h,); got {self.shapes}")
        if not self.A.shape[1:] == self.B.shape[1:] == (len(self.mu), self.A.shape[2]):
            raise ValueError(f"A, B, mu must agree in h and r; got {self.shapes}")

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        return tuple(self.A.shape), tuple(self.B.shape), tuple(self.mu.shape)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.A, self.B, self.mu

    @property
    def h(self) -> int:
        return self.A.shape[1]

    @property
    def r(self) -> int:
        return self.A.shape[2]

    @property
    def out_features(self) -> int:
        return self.A.shape[0]

    @property
    def in_features(self) -> int:
        return self.B.shape[0]

    def prune(self, keep: Tensor) -> "Triplets":
        """The triplets where the boolean mask `keep` (h,) is true."""
        return Triplets(self.A[:, keep], self.B[:, keep], self.mu[keep])

    def map(self, function: Callable[[Tensor], Tensor]) -> "Triplets":
        """Triplets with the function applied to A, B and mu, for example a cast."""
        return Triplets(function(self.A), function(self.B), function(self.mu))

    def scaled(self, factor: float) -> "Triplets":
        """Triplets whose matrix is `factor` times the matrix of these."""
        return Triplets(self.A, self.B, self.mu * factor)


def column_sizes(factor: Tensor) -> Tensor:
    """Root mean square (h,) of each column block of A or B, (rows, h, r); 1 where it is zero."""
    size = factor.square().mean((0, 2)).sqrt()
    return torch.where(size > 0, size, 1.0)


def alternating_signs(h: int, like: Tensor) -> Tensor:
    """The signs +1, -1, +1, ... (h,), a start for mu in which a part common to all triplets cancels."""
    signs = torch.ones(h, dtype=like.dtype, device=like.device)
    signs[1::2] = -1
    return signs
