"""Methods whose term is a rounded matrix plus linear factors, W' = Q + L R^T."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice

import torch
from torch import Tensor

from nla.machine.errors import require_integer
from nla.matrix.objective import Objective
from nla.methods.base import MatrixMethod, Shape
from nla.methods.packed_svd import PackedSVD
from nla.methods.rounding import relative_error
from nla.methods.svd import SVD
from nla.solvers.base import Solution, Start, Status
from nla.terms.base import Sum, Term
from nla.terms.grid import Grid
from nla.terms.kernel_term import nothing

LOW_RANK_SHARE = 1 / 16  # fraction of the bits that the linear factors get at least, if no rank is given

Pair = tuple[Term, Term]  # a rounded matrix Q, and linear factors L and R


class RoundedPlusLowRank(MatrixMethod):
    """A method that yields pairs of Q and factors, one after another. The pair of the smallest error is kept.

    Args:
        rank: of the linear factors; Q is the largest that fits beside them. None: Q is the largest that leaves LOW_RANK_SHARE
            of the bits, and the factors get all that are left. A grid does not have narrower codes for that.
        iterations: the largest number of pairs.
        rounding: the method that rounds a matrix to Q.
        factors: the method that fits the linear factors.

    Attributes:
        patience: pairs without a smaller error after which the search ends.

    Raises:
        UserError: rank or iterations is below 1.
    """

    patience = 1

    def __init__(self, rank: int | None, iterations: int, rounding: MatrixMethod, factors: SVD | PackedSVD) -> None:
        if rank is not None:
            require_integer("method.rank", rank, 1)
        require_integer("method.iterations", iterations, 1)
        self.rank, self.iterations, self.rounding, self.factors = rank, iterations, rounding, factors

    @abstractmethod
    def pairs(self, objective: Objective, planned: Pair, generator: torch.Generator) -> Iterator[Pair]:
        """Pairs of the planned sizes, fp32; without an end."""

    def rounded(self, matrix: Tensor, objective: Objective, planned: Term, generator: torch.Generator) -> Term:
        """The matrix (out, in), fp32, rounded to the planned size in the objective's norm."""
        return self.rounding.start(Objective(matrix, objective.factor), planned, generator).term

    def low_rank(self, matrix: Tensor, objective: Objective, planned: Term) -> Term:
        """Linear factors of the planned size for a matrix (out, in), fp32, with a small error in the objective's norm."""
        return self.factors.start(Objective(matrix, objective.factor), planned, torch.Generator()).term

    def rounded_first(self, objective: Objective, planned: Pair, generator: torch.Generator) -> Iterator[Pair]:
        """Pairs by alternation: W - L R^T is rounded, at first with L R^T = 0, and factors are fitted to what Q leaves."""
        weight = rest = objective.weight
        while True:
            rounded = self.rounded(rest, objective, planned[0], generator)
            factors = self.low_rank(weight - rounded.dense().detach(), objective, planned[1])
            yield rounded, factors
            rest = weight - factors.dense().detach()

    def factors_first(self, objective: Objective, planned: Pair, generator: torch.Generator) -> Iterator[Pair]:
        """Pairs by alternation: factors are fitted to W - Q, at first with Q = 0, and what they leave is rounded."""
        weight = rest = objective.weight
        while True:
            factors = self.low_rank(rest, objective, planned[1])
            rounded = self.rounded(weight - factors.dense().detach(), objective, planned[0], generator)
            yield rounded, factors
            rest = weight - rounded.dense().detach()

    def plan_matrix(self, out_features: int, in_features: int, bits: int, dtype: torch.dtype) -> Term:
        least = self.factors.bits_of(out_features, in_features, self.rank or 1, dtype)
        share = least if self.rank else max(least, int(LOW_RANK_SHARE * bits))
        rounded = self.plan_rounded(out_features, in_features, bits - share, bits - least, dtype)
        if not rounded.count():
            return nothing(out_features, in_features, dtype)
        left = least if self.rank else bits - rounded.bits()
        return Sum([rounded, self.factors.plan_matrix(out_features, in_features, left, dtype)])

    def plan_rounded(self, out_features: int, in_features: int, bits: int, most: int, dtype: torch.dtype) -> Term:
        """Q with at most `bits` bits, unless a grid with at most `most` bits has wider codes.

        Then it is the smallest grid with these codes: narrower codes lose more than a few ranks gain.
        """
        wanted, largest = (self.rounding.plan_matrix(out_features, in_features, b, dtype) for b in (bits, most))
        if isinstance(largest, Grid) and not (isinstance(wanted, Grid) and wanted.form.width == largest.form.width):
            form = replace(largest.form, group=in_features)  # the smallest with such codes
            return Grid.empty(out_features, in_features, form.width, form.group, form.kind, dtype)
        return wanted if wanted.count() else largest

    def least_bits(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        beside = sum(self.factors.bits_of(m, n, self.rank or 1, dtype) for m, n in shapes)
        return self.rounding.least_bits(shapes, dtype) + beside

    def terms(self, objective: Objective, planned: Term, generator: torch.Generator) -> Iterator[Term]:
        """The terms of the pairs."""
        rounded, low = planned.leaves()
        for pair in islice(self.pairs(objective, (rounded, low), generator), self.iterations):
            yield Sum(pair)

    def start(self, objective: Objective, planned: Term, generator: torch.Generator) -> Start:
        return Start(next(self.terms(objective, planned, generator)))

    def find(self, objective: Objective, planned: Term, generator: torch.Generator) -> Solution:
        losses: list[tuple[int, float]] = []
        for step, term in enumerate(self.terms(objective, planned, generator)):
            losses.append((step, relative_error(term.dense().detach(), objective)))
            lowest = min(losses, key=lambda row: row[1])
            if lowest[0] == step:
                best = term
            elif step - lowest[0] >= self.patience:
                break
        return Solution(best, losses, len(losses) - 1, Status.ROUNDED, None)

    @property
    def steps(self) -> int:
        """Pairs after the first one."""
        return self.iterations - 1

    def start_flops(self, term: Term) -> int:
        """Operations of one pair."""
        rounded, low = term.leaves()
        return self.rounding.start_flops(rounded) + self.factors.start_flops(low)

    def step_flops(self, term: Term) -> int:
        return self.start_flops(term)
