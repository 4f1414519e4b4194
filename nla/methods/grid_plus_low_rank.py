"""Methods whose term is a grid plus linear factors, W' = Q + L R^T."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice

import torch
from torch import Tensor

from nla.codes.grid_format import GridFormat, fitting, least_grid_bits
from nla.codes.rounding import Rounded, rounded_to_nearest
from nla.machine.errors import require_integer
from nla.matrix.objective import Objective
from nla.matrix.spectrum import spectrum_flops
from nla.methods.base import MatrixMethod, Shape
from nla.methods.grid_method import RTN_FLOPS, empty_grid, nothing, relative_error
from nla.methods.svd import SVD
from nla.solvers.base import Solution, Start, Status
from nla.terms.base import Sum, Term
from nla.terms.grid import Grid, grid_of

LOW_RANK_SHARE = 1 / 16  # fraction of the bits that the linear factors get at least, if no rank is given


class GridPlusLowRank(MatrixMethod):
    """A method that yields pairs of a grid and linear factors, one after another. The pair of the smallest error is kept.

    Args:
        rank: of the linear factors; the grid is the largest that fits beside them. None: the grid is the largest that leaves
            LOW_RANK_SHARE of the bits, and the factors get all that are left.
        iterations: the largest number of pairs.
        factors: the method that fits the linear factors; None: SVD, whose numbers have the model's type.

    Attributes:
        patience: pairs without a smaller error after which the search ends.

    Raises:
        UserError: rank or iterations is below 1.
    """

    patience = 1

    def __init__(self, rank: int | None, iterations: int, factors: MatrixMethod | None = None) -> None:
        if rank is not None:
            require_integer("method.rank", rank, 1)
        require_integer("method.iterations", iterations, 1)
        self.rank, self.iterations, self.factors = rank, iterations, factors or SVD()

    @abstractmethod
    def pairs(self, objective: Objective, form: GridFormat, low: Term) -> Iterator[tuple[Rounded, Term]]:
        """Pairs of a grid of this format and linear factors of the size of `low`, fp32; without an end."""

    def low_rank(self, matrix: Tensor, objective: Objective, low: Term) -> Term:
        """Linear factors of the size of `low` for a matrix (out, in), fp32, with a small error in the objective's norm."""
        return self.factors.start(Objective(matrix, objective.factor), low, torch.Generator()).term

    def factors_first(
        self, objective: Objective, form: GridFormat, low: Term, importance: Tensor | None = None
    ) -> Iterator[tuple[Rounded, Term]]:
        """Pairs by alternation: linear factors for W - Q, at first with Q = 0, and a grid for what they leave.

        Args:
            importance: of the inputs (in,) for the rounding, see `rounded_to_nearest`.
        """
        weight = rest = objective.weight
        while True:
            factors = self.low_rank(rest, objective, low)
            rounded = rounded_to_nearest(weight - factors.dense().detach(), form, importance)
            yield rounded, factors
            rest = weight - rounded.dense(form)

    def levels(self, form: GridFormat) -> GridFormat:
        """The format with the levels of the method, which takes no more bits. The default is the format itself."""
        return form

    def plan_matrix(self, out_features: int, in_features: int, bits: int, dtype: torch.dtype) -> Term:
        one = self.factors.least_bits([(out_features, in_features)], dtype)
        least = one * (self.rank or 1)
        share = least if self.rank else max(least, int(LOW_RANK_SHARE * bits))
        found = fitting(out_features, in_features, bits - share) or fitting(out_features, in_features, bits - least)
        if not found:
            return nothing(out_features, in_features, dtype)
        form = self.levels(found[0])
        left = least if self.rank else bits - form.bits(out_features, in_features)
        low = self.factors.plan_matrix(out_features, in_features, left, dtype)
        return Sum([empty_grid(out_features, in_features, form, dtype), low])

    def least_bits(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        return sum(least_grid_bits(m, n) + (self.rank or 1) * self.factors.least_bits([(m, n)], dtype) for m, n in shapes)

    def terms(self, objective: Objective, planned: Term) -> Iterator[Term]:
        """The terms of the pairs."""
        grid, low = planned.leaves()
        assert isinstance(grid, Grid)
        for rounded, factors in islice(self.pairs(objective, grid.form, low), self.iterations):
            yield Sum([grid_of(rounded, grid.form), factors])

    def start(self, objective: Objective, planned: Term, generator: torch.Generator) -> Start:
        return Start(next(self.terms(objective, planned)))

    def find(self, objective: Objective, planned: Term, generator: torch.Generator, memory: ExitStack) -> Solution:
        losses: list[tuple[int, float]] = []
        for step, term in enumerate(self.terms(objective, planned)):
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
        return RTN_FLOPS * term.out_features * term.in_features + spectrum_flops(term.out_features, term.in_features)

    def step_flops(self, term: Term) -> int:
        return self.start_flops(term)
