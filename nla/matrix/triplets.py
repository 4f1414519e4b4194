"""The container of every compressed matrix: triplets tau_l = {A[:, l, :], mu[l], B[:, l, :]}."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


def triplet_size(out_features: int, in_features: int, r: int) -> int:
    """Parameters of one triplet: r columns in A and in B, and one mu."""
    return (out_features + in_features) * r + 1


@dataclass(frozen=True)
class Triplets:
    """Factors A (out, h, r), B (in, h, r) and coefficients mu (h,); every kernel is linear in mu."""

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

    def count(self) -> int:
        """Parameters of the triplets that count: those with mu != 0."""
        return int((self.mu != 0).sum()) * triplet_size(self.out_features, self.in_features, self.r)

    def prune(self, keep: Tensor) -> "Triplets":
        """The triplets where the boolean mask `keep` (h,) is true."""
        return Triplets(self.A[:, keep], self.B[:, keep], self.mu[keep])

    def map(self, function: Callable[[Tensor], Tensor]) -> "Triplets":
        """The same function on A, B and mu (a cast, a move, a detach)."""
        return Triplets(function(self.A), function(self.B), function(self.mu))

    def scaled(self, factor: float) -> "Triplets":
        """Triplets of `factor` times the matrix."""
        return Triplets(self.A, self.B, self.mu * factor)


def alternating_signs(h: int, like: Tensor) -> Tensor:
    """+1, -1, +1, ... (h,): a start for mu in which what all triplets share cancels."""
    signs = torch.ones(h, dtype=like.dtype, device=like.device)
    signs[1::2] = -1
    return signs
