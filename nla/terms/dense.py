"""A matrix that is kept as it is."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from nla.machine.device import type_name
from nla.terms.base import Stored, Term, class_path


class Dense(Term):
    """W' = W, the weight (out, in). A budget that gives a matrix all its bits leaves it dense."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.weight = nn.Parameter(weight.detach())

    @classmethod
    def empty(cls, out_features: int, in_features: int, dtype: torch.dtype) -> "Dense":  # type: ignore[override]
        return cls(torch.empty(out_features, in_features, dtype=dtype, device="meta"))

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight)  # (..., in) -> (..., out)

    def dense(self) -> Tensor:
        return self.weight

    def stored(self) -> list[Stored]:
        return Stored.all_of(self.weight)

    def config(self) -> dict[str, Any]:
        return {
            "class": class_path(self),
            "out_features": self.out_features,
            "in_features": self.in_features,
            "dtype": type_name(self.weight),
        }

    def describe(self) -> str:
        return "dense"

    def forward_flops(self, tokens: int) -> int:
        return 2 * tokens * self.weight.numel()

    def dense_flops(self) -> int:
        return 0

    def scaled(self, factor: float) -> "Dense":
        return Dense(self.weight * factor)

    def as_stored(self, dtype: torch.dtype) -> "Dense":
        return Dense(self.weight.to(dtype))


def dense_bits(out_features: int, in_features: int, dtype: torch.dtype) -> int:
    """Bits of a matrix in this type."""
    return 8 * dtype.itemsize * out_features * in_features
