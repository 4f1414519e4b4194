"""Shares by effective rank: matrices with a flat spectrum keep a larger rank (D-Rank, Mi et al., 2025)."""

import re

from nla.budget.base import ModelView, Target
from nla.budget.measured import MeasuredBudget
from nla.machine.errors import require_fraction
from nla.matrix.spectrum import Spectrum
from nla.models.select import LinearSpec


class EffectiveRank(MeasuredBudget):
    """Matrices of one kind share their bits: their ranks are in proportion to sqrt(E / (out + in)).

    A kind are the matrices with the same last name, such as all `q_proj` of a model. Each rank costs out + in numbers.
    E = exp(-sum p log p) is the effective rank, where p are the squared singular values divided by their sum. The singular
    values are those of the whitened weight W L, where L L^T is the Gram matrix of the layer's inputs (the sum of x x^T). No
    matrix gets more than its dense size; the rest goes to the others of its kind.

    The authors' code also keeps uniform shares for gate projections, and for kinds whose summed error that lowers. This class
    does not.

    Args:
        givers, takers: regular expressions that are searched in qualified names.
        moved: fraction of the givers' bits that moves to the takers of the same block; 0 for none. D-Rank moves bits from
            queries and keys to values.
    """

    needs = frozenset({"gram"})

    def __init__(self, givers: str, takers: str, moved: float) -> None:
        require_fraction("budget.moved", moved)
        self.givers, self.takers, self.moved = re.compile(givers), re.compile(takers), moved

    def look(self, specs: list[LinearSpec], target: Target, view: ModelView) -> dict[str, int]:
        # share = rank * (out + in), in proportion to sqrt(E * (out + in))
        ranks = {s.name: effective_rank(view.norms(s.name).outputs.spectrum) for s in specs}
        weights = {s.name: (ranks[s.name] * (s.out_features + s.in_features)) ** 0.5 for s in specs}
        most = {s.name: float(target.width * s.n_params) for s in specs}
        kinds: dict[str, list[LinearSpec]] = {}
        for spec in specs:
            kinds.setdefault(spec.name.rpartition(".")[2], []).append(spec)
        found: dict[str, float] = {}
        for same in kinds.values():
            own = {spec.name: weights[spec.name] for spec in same}
            found |= in_proportion(own, most, target.bits * sum(spec.n_params for spec in same))
        moved = self.move({spec.name: found[spec.name] for spec in specs}, most)
        return {name: int(bits) for name, bits in moved.items()}

    def move(self, bits: dict[str, float], most: dict[str, float]) -> dict[str, float]:
        """{matrix: bits} after each block's givers gave to its takers. No taker gets more than `most`."""
        found = dict(bits)
        for block in {name.rpartition(".")[0] for name in bits}:
            names = [name for name in bits if name.rpartition(".")[0] == block]
            givers = [name for name in names if self.givers.search(name)]
            takers = [name for name in names if self.takers.search(name)]
            room = sum(most[name] - bits[name] for name in takers)
            given = sum(self.moved * bits[name] for name in givers)
            if not room or not given:
                continue
            part = min(1.0, room / given)
            for name in givers:
                found[name] -= part * self.moved * bits[name]
            for name in takers:
                found[name] += part * given * (most[name] - bits[name]) / room
        return found


def effective_rank(spectrum: Spectrum) -> float:
    """exp of the entropy of the normalised squared singular values (Roy and Vetterli, 2007); 1 for a matrix of zeros."""
    squares = spectrum.squares
    p = squares / squares.sum().clamp(min=1e-300)
    return float((-(p * p.clamp(min=1e-300).log()).sum()).exp())


def in_proportion(weights: dict[str, float], most: dict[str, float], total: float) -> dict[str, float]:
    """`total` divided in proportion to the weights, but at most `most` for each. The others share the remainder."""
    found: dict[str, float] = {}
    while True:
        left = total - sum(found.values())
        open_weights = {name: weight for name, weight in weights.items() if name not in found}
        each = left / sum(open_weights.values()) if open_weights else 0.0
        full = [name for name, weight in open_weights.items() if each * weight >= most[name]]
        if not full:
            return found | {name: each * weight for name, weight in open_weights.items()}
        found |= {name: most[name] for name in full}
