"""Methods whose term is a grid plus linear factors, W' = Q + L R^T."""

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from itertools import islice

import torch
from torch import Tensor

from nla.kernels.linear import Linear
from nla.machine.errors import require_integer
from nla.matrix.objective import Objective
from nla.matrix.spectrum import spectrum_flops
from nla.matrix.triplets import Triplets, triplet_size
from nla.methods.base import MatrixMethod, Shape
from nla.methods.grid_method import RTN_FLOPS, empty_grid, nothing, relative_error
from nla.solvers.base import Solution, Start, Status
from nla.storage.grid_format import GridFormat, fitting, least_grid_bits
from nla.storage.rounding import Rounded
from nla.terms.base import Sum, Term
from nla.terms.grid import Grid, grid_of
from nla.terms.kernel_term import KernelTerm

LOW_RANK_SHARE = 1 / 16  # fraction of the bits that the linear factors get at least, if no rank is given


class GridPlusLowRank(MatrixMethod):
    """A method that yields pairs of a grid and linear factors, one after another. The pair of the smallest error is kept.

    Args:
        rank: of the linear factors, whose numbers have the model's type; the grid is the largest that fits beside them. None:
            the grid is the largest that leaves LOW_RANK_SHARE of the bits, and the factors get all that are left.
        iterations: the largest number of pairs.

    Attributes:
        patience: pairs without a smaller error after which the search ends.

    Raises:
        UserError: rank or iterations is below 1.
    """

    patience = 1

    def __init__(self, rank: int | None, iterations: int) -> None:
        if rank is not None:
            require_integer("method.rank", rank, 1)
        require_integer("method.iterations", iterations, 1)
        self.rank, self.iterations = rank, iterations

    @abstractmethod
    def pairs(self, objective: Objective, form: GridFormat, rank: int) -> Iterator[tuple[Rounded, Triplets]]:
        """Pairs of a grid of this format and linear triplets of this rank, fp32; without an end."""

    def levels(self, form: GridFormat) -> GridFormat:
        """The format with the levels of the method, which takes no more bits. The default is the format itself."""
        return form

    def plan_matrix(self, out_features: int, in_features: int, bits: int, dtype: torch.dtype) -> Term:
        one = triplet_size(out_features, in_features, 1) * 8 * dtype.itemsize
        least = one if self.rank is None else self.rank * one
        share = max(least, int(LOW_RANK_SHARE * bits)) if self.rank is None else least
        found = fitting(out_features, in_features, bits - share) or fitting(out_features, in_features, bits - least)
        if not found:
            return nothing(out_features, in_features, dtype)
        form = self.levels(found[0])
        rank = self.rank or (bits - form.bits(out_features, in_features)) // one
        low = KernelTerm.empty(Linear(), out_features, in_features, min(rank, out_features, in_features), 1, dtype)
        return Sum([empty_grid(out_features, in_features, form, dtype), low])

    def least_bits(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        factors = 8 * dtype.itemsize * (self.rank or 1)
        return sum(least_grid_bits(m, n) + factors * triplet_size(m, n, 1) for m, n in shapes)

    def terms(self, objective: Objective, planned: Term) -> Iterator[Term]:
        """The terms of the pairs."""
        grid, low = planned.leaves()
        assert isinstance(grid, Grid) and isinstance(low, KernelTerm)
        for rounded, triplets in islice(self.pairs(objective, grid.form, low.triplets.h), self.iterations):
            yield Sum([grid_of(rounded, grid.form), KernelTerm(Linear(), triplets)])

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
        return Solution(best, losses, 0, Status.ROUNDED, None)

    def start_flops(self, term: Term) -> int:
        return RTN_FLOPS * term.out_features * term.in_features + spectrum_flops(term.out_features, term.in_features)


def low_rank(matrix: Tensor, objective: Objective, rank: int) -> Triplets:
    """The best linear triplets of this rank for a matrix (out, in), fp32, in the objective's norm."""
    left, s, right = (part.to(matrix) for part in Objective(matrix, objective.factor).spectrum.truncated(rank))
    return Triplets(left[:, :, None], right[:, :, None], s)


def product(triplets: Triplets) -> Tensor:
    """The matrix (out, in) of linear triplets."""
    return Linear().dense(triplets)
