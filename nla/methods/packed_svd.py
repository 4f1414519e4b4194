"""Linear factors in few bits, fitted in any norm."""

from collections.abc import Iterator, Sequence

import torch

from nla.codes.factors import refitted_left, refitted_right, rounded_left
from nla.codes.feedback import gptq
from nla.codes.grid_format import GridFormat
from nla.codes.rounding import rounded_to_nearest
from nla.machine.errors import UserError
from nla.matrix.objective import Objective
from nla.matrix.spectrum import balanced_factors, spectrum_flops
from nla.methods.base import MatrixMethod, Shape
from nla.methods.gptq import gptq_flops
from nla.methods.grid_method import RTN_FLOPS
from nla.methods.rounding import hessian, relative_error
from nla.methods.svd import SVD
from nla.solvers.base import Solution, Start, Status
from nla.storage.base import Coded, Float, Storage
from nla.terms.base import Term
from nla.terms.grid import grid_of
from nla.terms.grid_factors import GridFactors
from nla.terms.kernel_term import nothing

GROUP = 128  # numbers of a column of a factor that share a scale and a zero point
ROUNDS = 3  # of both factors in turn; the best one is kept


def svd_with(storage: Storage) -> "SVD | PackedSVD":
    """Truncated SVD whose factors are stored so: in the model's type, or as codes.

    Raises:
        UserError: the storage is neither `float` nor a grid of a fixed width.
    """
    if isinstance(storage, Float):
        return SVD()
    if not isinstance(storage, Coded) or storage.kind != "int" or storage.width is None:
        raise UserError(
            "linear factors of this method need a storage of their own; use storage=float, int8, int4, int3 or int2"
        )
    return PackedSVD(storage.width)


class PackedSVD(MatrixMethod):
    """W' = L R^T of the largest rank that fits, where both factors are grids.

    It begins with truncated SVD in the objective's norm. Then, in turn: R is rounded with error feedback; L is fitted to the
    rounded R by least squares and rounded with error feedback; R is fitted to the rounded L.

    Args:
        width: bits of a code.
    """

    def __init__(self, width: int) -> None:
        self.form = GridFormat(width, GROUP)

    def bits_of(self, out_features: int, in_features: int, rank: int, dtype: torch.dtype) -> int:
        """Bits of factors of this rank."""
        return self.form.bits(rank, out_features) + self.form.bits(rank, in_features)

    def plan_matrix(self, out_features: int, in_features: int, bits: int, dtype: torch.dtype) -> Term:
        rank = min(bits // self.bits_of(out_features, in_features, 1, dtype), out_features, in_features)
        while rank < min(out_features, in_features) and self.bits_of(out_features, in_features, rank + 1, dtype) <= bits:
            rank += 1  # zero points of several columns share bytes
        if not rank:
            return nothing(out_features, in_features, dtype)
        form = self.form
        return GridFactors.empty(out_features, in_features, rank, form.width, form.group, form.kind, dtype)

    def least_bits(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        return sum(self.bits_of(m, n, 1, dtype) for m, n in shapes)

    def pairs(self, objective: Objective, rank: int) -> Iterator[GridFactors]:
        """The factors after each round."""
        form, weight = self.form, objective.weight
        of_inputs = None if objective.factor is None else hessian(objective)
        right = balanced_factors(objective.spectrum, rank)[1].to(weight)
        for _ in range(ROUNDS):
            rows = right.T.contiguous()
            rounded = rounded_to_nearest(rows, form) if of_inputs is None else gptq(rows, of_inputs, form)
            fixed = rounded.dense(form).T.double()  # (in, rank)
            seen = fixed if of_inputs is None else of_inputs.gram @ fixed
            left, seen_by_left = refitted_left(weight, fixed, seen)
            columns = rounded_left(left, seen_by_left, form)
            yield GridFactors(grid_of(columns, form), grid_of(rounded, form))
            right = refitted_right(weight, columns.dense(form).T.double())

    def start(self, objective: Objective, planned: Term, generator: torch.Generator) -> Start:
        return Start(self.find(objective, planned, generator).term)

    def find(self, objective: Objective, planned: Term, generator: torch.Generator) -> Solution:
        assert isinstance(planned, GridFactors)
        terms = list(self.pairs(objective, planned.rank_bound()))
        losses = [(step, relative_error(term.dense().detach(), objective)) for step, term in enumerate(terms)]
        best, _ = min(losses, key=lambda row: row[1])
        return Solution(terms[best], losses, 0, Status.ROUNDED, None)

    def start_flops(self, term: Term) -> int:
        m, n, k = term.out_features, term.in_features, term.rank_bound() or 0
        each = gptq_flops(k, n) + RTN_FLOPS * k * (m + n) + 4 * m * n * k + 4 * n * n * k
        return spectrum_flops(m, n) + ROUNDS * each
