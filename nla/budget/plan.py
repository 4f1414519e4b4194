"""The plan of a run: the bits that every matrix may keep, and the terms that the method makes of them."""

import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from nla.budget.base import Target
from nla.machine.errors import UserError
from nla.matrix.triplets import triplet_size
from nla.methods.base import Method
from nla.models.select import LinearSpec
from nla.terms.base import Term, shares


@dataclass(frozen=True)
class PlannedMatrix:
    """A matrix, the term that will replace it (without numbers), and its share of the budget in bits."""

    spec: LinearSpec
    term: Term
    bits: int


@dataclass(frozen=True)
class PlannedGroup:
    """Matrices that are compressed together."""

    matrices: tuple[PlannedMatrix, ...]

    @property
    def bits(self) -> int:
        """The sum of the matrices' shares."""
        return sum(matrix.bits for matrix in self.matrices)


@dataclass(frozen=True)
class Plan:
    """All matrices of a run, in the groups in which they are compressed."""

    groups: tuple[PlannedGroup, ...]

    @cached_property
    def matrices(self) -> list[PlannedMatrix]:
        return [matrix for group in self.groups for matrix in group.matrices]

    @property
    def layers(self) -> list[str]:
        """Qualified names of all matrices."""
        return [matrix.spec.name for matrix in self.matrices]

    @property
    def selected(self) -> int:
        """Number of parameters of the dense matrices."""
        return sum(matrix.spec.n_params for matrix in self.matrices)

    @cached_property
    def kept(self) -> dict[str, int]:
        """{matrix: numbers that its term stores}. Shared numbers count for the first matrix only."""
        counts = [numbers for numbers, _ in shares([matrix.term for matrix in self.matrices])]
        return dict(zip(self.layers, counts, strict=True))

    @cached_property
    def kept_bits(self) -> int:
        """Bits that all terms store."""
        return sum(bits for _, bits in shares([matrix.term for matrix in self.matrices]))

    def of_layers(self, layers: list[str]) -> "Plan":
        """The plan of those groups whose matrices are all in `layers`."""
        return Plan(tuple(g for g in self.groups if all(m.spec.name in layers for m in g.matrices)))


def make_plan(specs: list[LinearSpec], target: Target, allocated: dict[str, int], method: Method, dtype: torch.dtype) -> Plan:
    """The plan: groups of matrices, and the terms that the method makes of their bits.

    Args:
        target: named in the error message.
        allocated: {matrix: bits}, without those of the linear term that retraining adds.
        dtype: the model's type.

    Raises:
        UserError: a matrix gets fewer bits than the smallest term takes; it names the matrix and a setting that works.
    """
    groups, starved = [], []
    for group in method.groups(specs):
        shapes = [(spec.out_features, spec.in_features) for spec in group]
        terms = method.plan(shapes, sum(allocated[spec.name] for spec in group), dtype)
        matrices = [PlannedMatrix(s, t, allocated[s.name]) for s, t in zip(group, terms, strict=True)]
        groups.append(PlannedGroup(tuple(matrices)))
        least, n_params = method.least_bits(shapes, dtype), sum(spec.n_params for spec in group)
        starved += [(least / n_params, least, matrix) for matrix in matrices if matrix.term.count() == 0]
    if starved:
        raise UserError(why_starved(*max(starved, key=lambda row: row[0]), target))
    return Plan(tuple(groups))


def without_linear_term(shares: dict[str, int], specs: list[LinearSpec], rank: int, width: int) -> dict[str, int]:
    """The bits of every matrix without those of a linear term of this rank, whose numbers have `width` bits.

    Raises:
        UserError: no bits are left for some matrix.
    """
    left = {s.name: shares[s.name] - rank * triplet_size(s.out_features, s.in_features, 1) * width for s in specs}
    for s in specs:
        if rank and left[s.name] <= 0:
            numbers = shares[s.name] // width
            most = (numbers - 1) // triplet_size(s.out_features, s.in_features, 1)
            raise UserError(
                f"retrain.linear_term={rank} takes all of the {numbers} parameters of {s.name} "
                f"({s.out_features}x{s.in_features}); allowed here: below {max(most, 1)}, or a smaller ratio"
            )
    return left


def target_without_linear_term(target: Target, specs: list[LinearSpec], rank: int) -> Target:
    """The target of all that is not the linear terms of this rank."""
    added = rank * target.width * sum(triplet_size(s.out_features, s.in_features, 1) for s in specs)
    return replace(target, bits=target.bits - added / sum(s.n_params for s in specs))


def why_starved(per_weight: float, least: int, matrix: PlannedMatrix, target: Target) -> str:
    """The error message for a matrix whose bits buy no term, with a setting that works.

    Args:
        per_weight, least: bits that the smallest terms of the matrix's group take, per weight and altogether.
    """
    if least <= int(target.bits * matrix.spec.n_params):
        remedy = "it has less than its even share; use budget=uniform, or a smaller retrain.linear_term"
    elif target.asked.startswith("ratio"):
        most = math.floor(1000 * (1 - per_weight / target.width)) / 1000
        remedy = f"use ratio={most} at most" if most > 0 else "exclude it with select.exclude"
    else:
        remedy = f"use bits={math.ceil(1000 * per_weight) / 1000} at least"
    spec = matrix.spec
    return (
        f"{target.asked} leaves {spec.name} ({spec.out_features}x{spec.in_features}) {matrix.bits // target.width} parameters, "
        f"less than its smallest term of {least // target.width}; {remedy}"
    )
