"""A matrix of low rank whose factors are grids."""

from typing import Any

import torch
from torch import Tensor

from nla.terms.base import Factors, Stored, Term, class_path
from nla.terms.grid import Grid
from nla.terms.unpacked import UnpackedGrid


class GridFactors(Term):
    """W' = left^T @ right, where the rows of both grids are the columns of the factors of W'.

    So the groups run along the long sides of the factors.

    Args:
        left: (rank, out).
        right: (rank, in), of the same format.
    """

    def __init__(self, left: Grid, right: Grid) -> None:
        super().__init__()
        self.left, self.right = left, right
        self.out_features, self.in_features = left.in_features, right.in_features

    @classmethod
    def empty(  # type: ignore[override]
        cls, out_features: int, in_features: int, rank: int, width: int, group: int, levels: str, dtype: torch.dtype
    ) -> "GridFactors":
        return cls(*(Grid.empty(rank, n, width, group, levels, dtype) for n in (out_features, in_features)))

    def forward(self, x: Tensor) -> Tensor:
        return self.right(x) @ self.left.dense().to(x.dtype)  # (..., in) -> (..., rank) -> (..., out)

    def dense(self) -> Tensor:
        return self.left.dense().T @ self.right.dense()

    def factors(self) -> Factors:
        return self.left.dense().T, self.right.dense().T

    def stored(self) -> list[Stored]:
        return [*self.left.stored(), *self.right.stored()]

    def config(self) -> dict[str, Any]:
        own = {"class": class_path(self), "out_features": self.out_features, "in_features": self.in_features}
        shared = {key: value for key, value in self.left.config().items() if key in ("width", "group", "levels", "dtype")}
        return own | {"rank": self.left.out_features} | shared

    def describe(self) -> str:
        return f"factors rank={self.left.out_features} {self.left.describe()}"

    def forward_flops(self, tokens: int) -> int:
        numbers = self.left.out_features * self.out_features
        return self.right.forward_flops(tokens) + self.left.dense_flops() + 2 * tokens * numbers

    def dense_flops(self) -> int:
        product = 2 * self.out_features * self.in_features * self.left.out_features
        return product + self.left.dense_flops() + self.right.dense_flops()

    def scaled(self, factor: float) -> "GridFactors":
        return GridFactors(self.left.scaled(factor), self.right)

    def as_stored(self, dtype: torch.dtype) -> "GridFactors":
        return GridFactors(self.left.as_stored(dtype), self.right.as_stored(dtype))

    def trainable(self) -> Term:
        return GridFactors(UnpackedGrid(self.left), UnpackedGrid(self.right))

    def packed(self) -> Term:
        assert isinstance(self.left, UnpackedGrid) and isinstance(self.right, UnpackedGrid)
        return GridFactors(self.left.packed(), self.right.packed())

    def rank_bound(self) -> int:
        return self.left.out_features
