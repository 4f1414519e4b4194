"""The contract of a term: a summand of a compressed matrix that knows its forward, its numbers and its bits."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn


class Stored(NamedTuple):
    """A tensor that has to be kept: how many of its numbers count, and the bits that they take."""

    tensor: Tensor
    numbers: int
    bits: int


class Term(nn.Module, ABC):
    """A matrix W' (out, in), or a summand of one, in a compressed form.

    Attributes:
        out_features, in_features: the shape of the matrix.
    """

    out_features: int
    in_features: int

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """x @ dense().T: (..., in) -> (..., out), without ever holding out x in numbers."""

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix itself: (out, in)."""

    @abstractmethod
    def stored(self) -> list[Stored]:
        """All that must be kept to have the matrix again: numbers, codes, scales, indices, masks.

        A tensor that several terms share is the same object in each of them.
        """

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The class under `class`, and the arguments of its `empty`, as JSON. With the state dict it is a checkpoint."""

    @classmethod
    @abstractmethod
    def empty(cls, **config: Any) -> "Term":
        """A term of this shape without numbers (see `nla.terms.state.empty_term`)."""

    @abstractmethod
    def describe(self) -> str:
        """The term in a table: `phase h=43 r=1`."""

    @abstractmethod
    def forward_flops(self, tokens: int) -> int:
        """Floating-point operations of forward() on so many rows."""

    @abstractmethod
    def scaled(self, factor: float) -> "Term":
        """A term of `factor` times the matrix."""

    @abstractmethod
    def as_stored(self, dtype: torch.dtype) -> "Term":
        """The term as a model keeps it: its numbers rounded to this type, and without those that do not matter."""

    @abstractmethod
    def zero(self, like: Tensor) -> "Term":
        """A term of this kind whose matrix is zero, that stores as little as it can, of the type and device of `like`."""

    def rank_bound(self) -> int | None:
        """The largest rank that the matrix can have, or None where the term does not bound it."""
        return None

    def leaves(self) -> Iterator["Term"]:
        """The terms that this one is a sum of; of any other term, the term itself."""
        yield self

    def count(self) -> int:
        """Numbers stored."""
        return sum(numbers for numbers, _ in shares([self]))

    def bits(self) -> int:
        """Bits that storing the term takes."""
        return sum(bits for _, bits in shares([self]))

    def is_finite(self) -> bool:
        """Whether all numbers are finite."""
        return all(bool(torch.isfinite(s.tensor).all()) for s in self.stored())

    def extra_repr(self) -> str:
        return self.describe()


class Sum(Term):
    """W' = the sum of its terms."""

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

    def scaled(self, factor: float) -> "Sum":
        return Sum(term.scaled(factor) for term in self.summands)

    def as_stored(self, dtype: torch.dtype) -> "Sum":
        return Sum(term.as_stored(dtype) for term in self.summands)

    def zero(self, like: Tensor) -> "Sum":
        return Sum(term.zero(like) for term in self.summands)

    def rank_bound(self) -> int | None:
        bounds = [term.rank_bound() for term in self.summands]
        return None if None in bounds else sum(bound or 0 for bound in bounds)

    def leaves(self) -> Iterator[Term]:
        for term in self.summands:
            yield from term.leaves()


def shares(terms: Sequence[Term]) -> list[tuple[int, int]]:
    """Numbers and bits of each term. A tensor that several terms share counts for the first of them."""
    known: set[int] = set()
    found = []
    for term in terms:
        numbers = bits = 0
        for stored in term.stored():
            if id(stored.tensor) not in known:
                known.add(id(stored.tensor))
                numbers, bits = numbers + stored.numbers, bits + stored.bits
        found.append((numbers, bits))
    return found


def class_path(value: object) -> str:
    """`nla.kernels.phase.Phase`"""
    return f"{type(value).__module__}.{type(value).__qualname__}"
