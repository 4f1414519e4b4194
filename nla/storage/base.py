"""Storages: how the numbers of a method's triplets are kept. The fit of a storage with few bits knows its rounding."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from nla.codes.codebook import codebook_of
from nla.codes.packed import packed_width
from nla.kernels.base import Kernel, random_like
from nla.kernels.factored import CoarseToFine, FactoredKernel
from nla.machine.errors import UserError, require_choice, require_integer, require_positive
from nla.matrix.objective import Objective
from nla.matrix.triplets import Triplets, triplet_size
from nla.solvers.base import Solution, Start
from nla.solvers.factored import descend_factored
from nla.solvers.gradient import GradientFit
from nla.solvers.rounded import descend_rounded
from nla.solvers.triplets import descend_triplets
from nla.terms.base import Term
from nla.terms.coded import CodedTerm, coded_size
from nla.terms.kernel_term import KernelTerm
from nla.terms.rounded import RoundedTerm
from nla.terms.scaled import Scaled


class Storage(ABC):
    """The form in which the triplets of a kernel are stored, with the size that a number of bits allows, and the fit."""

    @abstractmethod
    def check(self, kernel: Kernel) -> None:
        """Raise UserError if the triplets of this kernel cannot be stored so."""

    @abstractmethod
    def plan(self, kernel: Kernel, out_features: int, in_features: int, bits: int, dtype: torch.dtype) -> Term:
        """The term without values, of the size that `bits` allow; count() is 0 if they allow no triplet."""

    @abstractmethod
    def least_bits(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        """Bits of a term with one triplet."""

    @abstractmethod
    def start(
        self, kernel: Kernel, solver: GradientFit, objective: Objective, planned: Term, generator: torch.Generator
    ) -> Start:
        """The start of a fit of a term of the planned size."""

    @abstractmethod
    def fit(self, solver: GradientFit, start: Start, objective: Objective) -> Solution:
        """The fit from this start."""

    def start_flops(self, kernel: Kernel, solver: GradientFit, out_features: int, in_features: int, h: int, r: int) -> int:
        """Floating-point operations of start(), to first order."""
        return kernel.warm_start_flops(out_features, in_features, h, r) if solver.start == "warm" else 0


class Float(Storage):
    """All numbers in the model's type."""

    def check(self, kernel: Kernel) -> None:
        pass

    def plan(self, kernel: Kernel, out_features: int, in_features: int, bits: int, dtype: torch.dtype) -> KernelTerm:
        h, r = kernel.size(out_features, in_features, bits // (8 * dtype.itemsize))
        return KernelTerm.empty(kernel, out_features, in_features, h, r, dtype)

    def least_bits(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        return triplet_size(out_features, in_features, 1) * 8 * dtype.itemsize

    def start(
        self, kernel: Kernel, solver: GradientFit, objective: Objective, planned: Term, generator: torch.Generator
    ) -> Start:
        assert isinstance(planned, KernelTerm)
        return solver.begin(kernel, objective, planned.h, planned.r, generator)

    def fit(self, solver: GradientFit, start: Start, objective: Objective) -> Solution:
        return descend_triplets(solver, start, objective)


COARSE = 2  # a coarse kernel is fitted in the solver's steps divided by this


class FloatAndScales(Storage):
    """All numbers in the model's type, and a scale of every row and column beside them. The kernel must have thin factors.

    Args:
        damping: of the preconditioned gradients of the fit, see `Objective.preconditioned`; None: plain gradients.

    Raises:
        UserError: damping is not positive.
    """

    triplets = Float()

    def __init__(self, damping: float | None) -> None:
        if damping is not None:
            require_positive("storage.damping", damping)
        self.damping = damping

    def check(self, kernel: Kernel) -> None:
        if not isinstance(kernel, FactoredKernel):
            raise UserError(f"storage=scaled needs a kernel with thin factors, unlike kernel={kernel.name}; use storage=float")

    def plan(self, kernel: Kernel, out_features: int, in_features: int, bits: int, dtype: torch.dtype) -> Scaled:
        scales = (out_features + in_features) * 8 * dtype.itemsize
        inner = self.triplets.plan(kernel, out_features, in_features, max(0, bits - scales), dtype)
        return Scaled.empty([inner], dtype)

    def least_bits(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        scales = (out_features + in_features) * 8 * dtype.itemsize
        return self.triplets.least_bits(out_features, in_features, dtype) + scales

    def start(
        self, kernel: Kernel, solver: GradientFit, objective: Objective, planned: Term, generator: torch.Generator
    ) -> Start:
        """Of a kernel that begins coarse: the finer start that follows from a fit of its coarse kernel."""
        assert isinstance(planned, Scaled) and isinstance(planned.inner, KernelTerm) and isinstance(kernel, FactoredKernel)
        first = kernel.coarse if isinstance(kernel, CoarseToFine) else kernel
        triplets = first_triplets(solver, first, objective, planned.inner.h, planned.inner.r, generator)
        start = Start(Scaled(KernelTerm(first, triplets), *ones(objective)))
        if not isinstance(kernel, CoarseToFine):
            return start
        found = self.fit(solver.with_steps(solver.steps // COARSE), start, objective).term
        assert isinstance(found, Scaled) and isinstance(found.inner, KernelTerm)
        rest = Objective(objective.weight - found.dense().detach(), objective.factor)
        finer = kernel.finer(found.inner.triplets.map(torch.detach), rest, generator)
        return Start(Scaled(KernelTerm(kernel, finer), found.rows, found.columns))

    def start_flops(self, kernel: Kernel, solver: GradientFit, out_features: int, in_features: int, h: int, r: int) -> int:
        size, flops = (out_features, in_features, h, r), super().start_flops(kernel, solver, out_features, in_features, h, r)
        if not isinstance(kernel, CoarseToFine):
            return flops
        return flops + solver.steps // COARSE * (kernel.coarse.fit_flops(*size) + kernel.coarse.weighting_flops(*size))

    def fit(self, solver: GradientFit, start: Start, objective: Objective) -> Solution:
        return descend_factored(solver, start, objective, self.damping)


DAMPING = 0.02  # of the fits with few bits, see `Objective.damped`
# By kind of codebook: (bits per weight, bits of a code) with the smallest errors below so many bits per weight. Measured on
# projections of SmolLM2.
WIDTHS = {
    "angle": ((1.75, 3), (3.7, 4), (math.inf, 5)),
    "int": ((1.25, 1), (2.6, 2), (3.8, 3), (math.inf, 4)),
}


class Coded(Storage):
    """A and B as codes of a few bits; mu and a scale of every row and column in the model's type.

    Args:
        kind: `angle` (equal distances on the circle, for the phase kernel) or `int` (levels at equal distances).
        width: bits of a code; None: by the bits per weight of each matrix, see WIDTHS.
        rounds: of coordinate descent after the solver's steps, see `nla.solvers.coordinates`.

    Raises:
        UserError: a value is not allowed.
    """

    def __init__(self, kind: str, width: int | None, rounds: int) -> None:
        require_integer("storage.rounds", rounds, 0)
        require_choice("storage.kind", kind, list(WIDTHS))
        self.kind, self.width, self.rounds = kind, width, rounds
        self.smallest = codebook_of(kind, WIDTHS[kind][0][1] if width is None else width)

    def check(self, kernel: Kernel) -> None:
        if not isinstance(kernel, FactoredKernel):
            raise UserError(f"storage={self.smallest.name} needs a kernel with thin factors, unlike kernel={kernel.name}")
        one = kernel.random_start(2, 2, 1, kernel.r, torch.Generator().manual_seed(0))
        self.smallest.scaled(kernel, one)

    def width_for(self, per_weight: float) -> int:
        """Bits of a code for a matrix with so many bits per weight."""
        return self.width or next(width for below, width in WIDTHS[self.kind] if per_weight < below)

    def plan(self, kernel: Kernel, out_features: int, in_features: int, bits: int, dtype: torch.dtype) -> CodedTerm:
        assert isinstance(kernel, FactoredKernel)
        width, number = self.width_for(bits / (out_features * in_features)), 8 * dtype.itemsize

        def triplets(r: int, width: int) -> int:
            return coded_size(out_features, in_features, r, width, bits, number)

        while width > self.smallest.width and not triplets(1, width):  # tiny matrices, of which scales take most bits
            width -= 1
        r = next((r for r in range(kernel.r, 1, -1) if triplets(r, width) >= kernel.min_h), 1)
        return CodedTerm.empty(kernel, self.kind, width, out_features, in_features, triplets(r, width), r, dtype)

    def least_bits(self, out_features: int, in_features: int, dtype: torch.dtype) -> int:
        number, codes = 8 * dtype.itemsize, [packed_width(n, self.smallest.width) for n in (out_features, in_features)]
        return 8 * sum(codes) + number * (out_features + in_features + 1)

    def start(
        self, kernel: Kernel, solver: GradientFit, objective: Objective, planned: Term, generator: torch.Generator
    ) -> Start:
        assert isinstance(planned, CodedTerm) and isinstance(kernel, FactoredKernel)
        triplets = first_triplets(solver, kernel, objective, planned.h, planned.r, generator)
        return Start(RoundedTerm(kernel, planned.codebook, planned.codebook.scaled(kernel, triplets), *ones(objective)))

    def fit(self, solver: GradientFit, start: Start, objective: Objective) -> Solution:
        assert isinstance(start.term, RoundedTerm)
        return descend_rounded(solver, self.rounds, start.term, objective.damped(DAMPING))


def first_triplets(
    solver: GradientFit, kernel: FactoredKernel, objective: Objective, h: int, r: int, generator: torch.Generator
) -> Triplets:
    """The triplets from which a fit with scales starts: random, or from singular vectors in a random basis."""
    if solver.start == "random":
        return random_like(kernel, objective.weight, h, r, generator)
    return kernel.mixed_start(objective, h, r, generator)


def ones(objective: Objective) -> tuple[Tensor, Tensor]:
    """Scales of 1 for the rows (out,) and the columns (in,) of the objective's weight."""
    rows, columns = (objective.weight.new_ones(n) for n in objective.weight.shape)
    return rows, columns
