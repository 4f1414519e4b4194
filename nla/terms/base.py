"""The base class of terms. A term is a summand of a compressed matrix, with a forward pass, a parameter count and bits."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

Factors = tuple[Tensor, Tensor]  # L (out, k) and R (in, k) of a matrix L R^T


class Stored(NamedTuple):
    """A tensor that storing a term requires, how many of its numbers are stored, and the bits that these take."""

    tensor: Tensor
    numbers: int
    bits: int

    @classmethod
    def all_of(cls, *tensors: Tensor) -> "list[Stored]":
        """Tensors of which every number is stored, each in its type."""
        return [cls(p, p.numel(), 8 * p.numel() * p.element_size()) for p in tensors]


class Term(nn.Module, ABC):
    """A matrix W' (out, in), or a summand of one, in a compressed form.

    Attributes:
        out_features, in_features: the shape of the matrix.
    """

    out_features: int
    in_features: int

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x @ dense().T: (..., in) -> (..., out), without an (out, in) matrix in memory."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix W' (out, in)."""

    @abstractmethod
    def stored(self) -> list[Stored]:
        """All tensors that must be stored to restore the matrix: numbers, codes, scales, indices, masks.

        A tensor shared by several terms must be the same object in each of them.
        """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """JSON values: the class under `class`, and the arguments of `empty`. A checkpoint is these and the state dict."""

    @classmethod
    @abstractmethod
    def empty(cls, **config: Any) -> "Term":
        """A term of this configuration without values (see `nla.terms.state.empty_term`)."""

    @abstractmethod
    def describe(self) -> str:
        """Text for the term in tables, such as `phase h=43 r=1`."""

    @abstractmethod
    def forward_flops(self, tokens: int) -> int:
        """Floating-point operations of forward() for an x of `tokens` rows."""

    @abstractmethod
    def dense_flops(self) -> int:
        """Floating-point operations of dense()."""

    @abstractmethod
    def scaled(self, factor: float) -> "Term":
        """A term whose matrix is `factor` times this one's."""

    @abstractmethod
    def as_stored(self, dtype: torch.dtype) -> "Term":
        """The term as a model stores it: with numbers of this type, and without numbers that have no effect."""

    def factors(self) -> Factors | None:
        """L (out, k) and R (in, k) with dense() = L R^T, differentiable; None if the term is no product of thin factors."""
        return None

    def wide_factors(self) -> Factors | None:
        """The same in float64, not differentiable, and such that they can be rounded to 16 bits: columns do not cancel."""
        found = self.factors()
        return found and (found[0].detach().double(), found[1].detach().double())

    def trainable(self) -> "Term":
        """A term of the same matrix in which all numbers are parameters that can be trained. `packed` leads back."""
        return self

    def packed(self) -> "Term":
        """A term of the same matrix in which rounded numbers are codes of a few bits."""
        return self

    def rank_bound(self) -> int | None:
        """The largest rank that the matrix can have, or None if the term does not bound it."""
        return None

    def leaves(self) -> Iterator["Term"]:
        """The summands of a Sum, at any depth. Any other term yields only itself."""
        yield self

    def count(self) -> int:
        """How many numbers are stored."""
        return sum(numbers for numbers, _ in shares([self]))

    def bits(self) -> int:
        """How many bits storing the term takes."""
        return sum(bits for _, bits in shares([self]))

    def is_finite(self) -> bool:
        """Whether all numbers are finite."""
        return all(bool(torch.isfinite(s.tensor).all()) for s in self.stored())

    def extra_repr(self) -> str:
        return self.describe()


class Sum(Term):
    """A term whose matrix W' is the sum of the matrices of other terms."""

    def __init__(self, terms: Iterable[Term]) -> None:
        super().__init__()
        self.terms = nn.ModuleList(terms)
        self.out_features, self.in_features = self.summands[0].out_features, self.summands[0].in_features

    @property
    def summands(self) -> list[Term]:
        return list(self.terms)  # type: ignore[arg-type]

    @classmethod
    def empty(cls, terms: Sequence[Term]) -> "Sum":  # type: ignore[override]
        return cls(terms)

    def forward(self, x: Tensor) -> Tensor:
        y = self.terms[0](x)
        for term in self.terms[1:]:
            y = y + term(x)
        return y

    def dense(self) -> Tensor:
        return torch.stack([term.dense() for term in self.summands]).sum(0)

    def stored(self) -> list[Stored]:
        return [stored for term in self.summands for stored in term.stored()]

    def config(self) -> dict[str, Any]:
        return {"class": class_path(self), "terms": [term.config() for term in self.summands]}

    def describe(self) -> str:
        return " + ".join(term.describe() for term in self.summands)

    def forward_flops(self, tokens: int) -> int:
        additions = tokens * self.out_features * (len(self.terms) - 1)
        return sum(term.forward_flops(tokens) for term in self.summands) + additions

    def dense_flops(self) -> int:
        additions = self.out_features * self.in_features * (len(self.terms) - 1)
        return sum(term.dense_flops() for term in self.summands) + additions

    def scaled(self, factor: float) -> "Sum":
        return Sum(term.scaled(factor) for term in self.summands)

    def as_stored(self, dtype: torch.dtype) -> "Sum":
        return Sum(term.as_stored(dtype) for term in self.summands)

    def trainable(self) -> "Sum":
        return Sum(term.trainable() for term in self.summands)

    def packed(self) -> "Sum":
        return Sum(term.packed() for term in self.summands)

    def factors(self) -> Factors | None:
        return side_by_side([term.factors() for term in self.summands])

    def wide_factors(self) -> Factors | None:
        return side_by_side([term.wide_factors() for term in self.summands])

    def rank_bound(self) -> int | None:
        bounds = [term.rank_bound() for term in self.summands]
        return None if None in bounds else sum(bound or 0 for bound in bounds)

    def leaves(self) -> Iterator[Term]:
        for term in self.summands:
            yield from term.leaves()


def side_by_side(summands: Sequence[Factors | None]) -> Factors | None:
    """The factors of a sum of matrices, given those of each; None if one has none."""
    known = [factors for factors in summands if factors is not None]
    if len(known) < len(summands):
        return None
    lefts, rights = zip(*known, strict=True)
    return torch.cat(lefts, 1), torch.cat(rights, 1)


def shares(terms: Sequence[Term]) -> list[tuple[int, int]]:
    """(numbers, bits) stored for each term. A tensor shared by several terms counts for the first of them."""
    known: set[int] = set()
    found = []
    for parts in [term.stored() for term in terms]:  # all at once: the id of a freed tensor may be given again
        numbers = bits = 0
        for stored in parts:
            if id(stored.tensor) not in known:
                known.add(id(stored.tensor))
                numbers, bits = numbers + stored.numbers, bits + stored.bits
        found.append((numbers, bits))
    return found


def class_path(value: object) -> str:
    """Dotted name of an object's class, such as `nla.kernels.phase.Phase`."""
    return f"{type(value).__module__}.{type(value).__qualname__}"
