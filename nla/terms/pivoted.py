"""A matrix of rank R stored as R of its rows and the coefficients of the others (PIFA)."""

from typing import Any

import torch
from torch import Tensor, nn

from nla.machine.device import type_name
from nla.terms.base import Factors, Stored, Term, class_path


class Pivoted(Term):
    """W'[pivots] = rows and W'[others] = coefficients @ rows, with R (out + in - R) numbers instead of R (out + in).

    Source: Zhao, Zhang and Cannistraci, "Pivoting Factorization" (PIFA), ICML 2025. Any matrix of rank R has such a form.

    Args:
        rows: (R, in), the pivot rows.
        coefficients: (out - R, R), of the other rows, in their order.
        pivots: (R,) int32, the sorted numbers of the pivot rows.
    """

    pivots: Tensor

    def __init__(self, rows: Tensor, coefficients: Tensor, pivots: Tensor) -> None:
        super().__init__()
        self.rows, self.coefficients = nn.Parameter(rows.detach()), nn.Parameter(coefficients.detach())
        self.register_buffer("pivots", pivots)
        self.out_features, self.in_features = len(rows) + len(coefficients), rows.shape[1]

    @classmethod
    def empty(cls, out_features: int, in_features: int, rank: int, dtype: torch.dtype) -> "Pivoted":  # type: ignore[override]
        rows = torch.empty(rank, in_features, dtype=dtype, device="meta")
        coefficients = torch.empty(out_features - rank, rank, dtype=dtype, device="meta")
        return cls(rows, coefficients, torch.empty(rank, dtype=torch.int32, device="meta"))

    def places(self) -> Tensor:
        """(out,) int64: the place of each row if the pivot rows come first and the others after them."""
        first = torch.zeros(self.out_features, dtype=torch.bool, device=self.pivots.device)
        first[self.pivots] = True
        return torch.where(first, first.cumsum(0) - 1, len(self.rows) + (~first).cumsum(0) - 1)

    def in_order(self, pivot: Tensor, other: Tensor) -> Tensor:
        """(..., R) of the pivot rows and (..., out - R) of the others, in the order of all rows: (..., out)"""
        return torch.cat((pivot, other), -1)[..., self.places()]

    def forward(self, x: Tensor) -> Tensor:
        pivot = x @ self.rows.T  # (..., R)
        return self.in_order(pivot, pivot @ self.coefficients.T)

    def dense(self) -> Tensor:
        return self.in_order(self.rows.T, (self.coefficients @ self.rows).T).T

    def stored(self) -> list[Stored]:
        return [
            *Stored.all_of(self.rows, self.coefficients),
            Stored(self.pivots, 0, 8 * self.pivots.numel() * self.pivots.element_size()),
        ]

    def config(self) -> dict[str, Any]:
        return {
            "class": class_path(self),
            "out_features": self.out_features,
            "in_features": self.in_features,
            "rank": len(self.rows),
            "dtype": type_name(self.rows),
        }

    def describe(self) -> str:
        return f"pivoted rank={len(self.rows)}"

    def forward_flops(self, tokens: int) -> int:
        return 2 * tokens * (self.rows.numel() + self.coefficients.numel())

    def dense_flops(self) -> int:
        return 2 * self.in_features * self.coefficients.numel()

    def scaled(self, factor: float) -> "Pivoted":
        return Pivoted(self.rows * factor, self.coefficients, self.pivots)

    def as_stored(self, dtype: torch.dtype) -> "Pivoted":
        return Pivoted(self.rows.to(dtype), self.coefficients.to(dtype), self.pivots)

    def rank_bound(self) -> int:
        return len(self.rows)

    def trainable(self) -> "Unpivoted":
        rows, R = self.rows.detach().double(), len(self.rows)
        triangle = torch.linalg.qr(rows.T)  # rows = scale.T @ basis.T
        one = torch.eye(R, dtype=rows.dtype, device=rows.device)
        left = self.in_order(one, self.coefficients.detach().double().T).T @ triangle.R.T  # (out, R)
        U, s, V = torch.linalg.svd(left, full_matrices=False)
        balanced = (U * s.sqrt(), triangle.Q @ (V.T * s.sqrt()))
        return Unpivoted(*(factor.to(self.rows.dtype) for factor in balanced))


class Unpivoted(Term):
    """A pivoted matrix in training, as the product L R^T. The coefficients of pivot rows would be hard to train.

    Args:
        left: L (out, R).
        right: R (in, R).
    """

    def __init__(self, left: Tensor, right: Tensor) -> None:
        super().__init__()
        # a fused optimiser needs its moments in the same memory order, and checkpoints restore them row by row
        self.left, self.right = (nn.Parameter(factor.detach().contiguous()) for factor in (left, right))
        self.out_features, self.in_features = len(left), len(right)

    @classmethod
    def empty(cls, out_features: int, in_features: int, rank: int, dtype: torch.dtype) -> "Unpivoted":  # type: ignore[override]
        return cls(*(torch.empty(size, rank, dtype=dtype, device="meta") for size in (out_features, in_features)))

    def factors(self) -> Factors:
        return self.left, self.right

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.right) @ self.left.T  # (..., in) -> (..., R) -> (..., out)

    def dense(self) -> Tensor:
        return self.left @ self.right.T

    def packed(self) -> Pivoted:
        return pivoted(self.left, self.right)

    def stored(self) -> list[Stored]:
        return self.packed().stored()

    def config(self) -> dict[str, Any]:
        return self.packed().config()

    def describe(self) -> str:
        return f"pivoted rank={self.rank_bound()}"

    def forward_flops(self, tokens: int) -> int:
        return 2 * tokens * (self.left.numel() + self.right.numel())

    def dense_flops(self) -> int:
        return 2 * self.out_features * self.right.numel()

    def scaled(self, factor: float) -> "Unpivoted":
        return Unpivoted(self.left * factor, self.right)

    def as_stored(self, dtype: torch.dtype) -> Pivoted:
        return self.packed().as_stored(dtype)

    def rank_bound(self) -> int:
        return self.left.shape[1]


def pivoted(left: Tensor, right: Tensor) -> Pivoted:
    """The term of the matrix left @ right.T, with numbers in the type of `left`: (out, k), (in, k) -> Pivoted of rank <= k.

    QR with column pivoting picks the rows, in float64, so that the coefficients stay small. The rank is the numerical one.
    """
    from scipy.linalg import qr, solve_triangular

    basis, scale = torch.linalg.qr(right.detach().double().cpu())  # (in, k) orthonormal, (k, k)
    rows = left.detach().double().cpu() @ scale.T  # (out, k): the rows of the matrix in this basis
    triangle, order = qr(rows.T.numpy(), mode="r", pivoting=True)
    size = abs(triangle.diagonal())
    rank = int((size > size.max(initial=0.0) * 1e-12).sum())
    order = torch.from_numpy(order.astype("int64"))
    chosen, rest = order[:rank], order[rank:]
    solved = solve_triangular(triangle[:rank, :rank], triangle[:rank, rank:])  # (rank, out - rank)
    coefficients = torch.from_numpy(solved).T[rest.argsort()]  # rows in their order, columns in that of `chosen`
    sorting = chosen.argsort()
    pivots = chosen[sorting]
    term = Pivoted(rows[pivots] @ basis.T, coefficients[:, sorting], pivots.int())
    return Pivoted(term.rows.to(left), term.coefficients.to(left), term.pivots.to(left.device))
