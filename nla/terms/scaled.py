"""Row and column scales around another term."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nla.machine.device import type_name
from nla.terms.base import Factors, Stored, Term, class_path


class Scaled(Term):
    """W'[i, j] = rows_i columns_j V[i, j], where V is the matrix of another term.

    A kernel whose values are bounded, such as the cosine of phase, gets rows and columns of different sizes by this.

    Args:
        rows, columns: (out,) and (in,), scales.
    """

    rows: nn.Parameter
    columns: nn.Parameter

    def __init__(self, term: Term, rows: Tensor, columns: Tensor) -> None:
        super().__init__()
        self.terms = nn.ModuleList([term])
        self.out_features, self.in_features = term.out_features, term.in_features
        self.rows, self.columns = nn.Parameter(rows.detach()), nn.Parameter(columns.detach())

    @classmethod
    def empty(cls, terms: Sequence[Term], dtype: torch.dtype) -> "Scaled":  # type: ignore[override]
        (term,) = terms
        return cls(term, *(torch.empty(n, dtype=dtype, device="meta") for n in (term.out_features, term.in_features)))

    @property
    def inner(self) -> Term:
        """The term of V."""
        return self.terms[0]  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x * self.columns)  # (..., in) -> (..., out)
        return y * self.rows

    def dense(self) -> Tensor:
        return self.rows[:, None] * self.inner.dense() * self.columns

    def stored(self) -> list[Stored]:
        inner = self.inner.stored()
        if not sum(stored.numbers for stored in inner):
            return []  # the matrix is zero
        return inner + Stored.all_of(self.rows, self.columns)

    def config(self) -> dict[str, Any]:
        return {"class": class_path(self), "terms": [self.inner.config()], "dtype": type_name(self.rows)}

    def describe(self) -> str:
        return f"{self.inner.describe()} scaled"

    def forward_flops(self, tokens: int) -> int:
        return self.inner.forward_flops(tokens) + tokens * (self.out_features + self.in_features)

    def dense_flops(self) -> int:
        return self.inner.dense_flops() + 2 * self.out_features * self.in_features

    def rank_bound(self) -> int | None:
        return self.inner.rank_bound()

    def scaled(self, factor: float) -> "Scaled":
        return self.around(self.inner.scaled(factor))

    def as_stored(self, dtype: torch.dtype) -> "Scaled":
        return Scaled(self.inner.as_stored(dtype), self.rows.to(dtype), self.columns.to(dtype))

    def trainable(self) -> "Scaled":
        return self.around(self.inner.trainable())

    def packed(self) -> "Scaled":
        return self.around(self.inner.packed())

    def factors(self) -> Factors | None:
        inner = self.inner.factors()
        return inner and (inner[0] * self.rows[:, None], inner[1] * self.columns[:, None])

    def wide_factors(self) -> Factors | None:
        inner = self.inner.wide_factors()
        return inner and (inner[0] * self.rows.detach()[:, None], inner[1] * self.columns.detach()[:, None])

    def around(self, term: Term) -> "Scaled":
        """The same scales around another term."""
        return Scaled(term, self.rows, self.columns)
