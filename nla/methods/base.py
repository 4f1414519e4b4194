"""The base classes of compression methods."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from nla.machine.errors import NonFiniteError, UserError
from nla.machine.peak_memory import PeakMemory
from nla.matrix.inputs import Statistics
from nla.matrix.objective import Norms, Objective
from nla.methods.fit import Fit, equal_rank, measured
from nla.models.select import LinearSpec
from nla.solvers.base import Solution, Start, Status
from nla.terms.base import Term
from nla.terms.dense import Dense, dense_bits
from nla.terms.kernel_term import nothing

Shape = tuple[int, int]  # (out, in)


class Method(ABC):
    """Compresses groups of weight matrices: it fits one term to each matrix, within a budget of bits for each group.

    A method that compresses each matrix alone implements `MatrixMethod`, which is shorter.

    Attributes:
        needs: names of the statistics (`nla.matrix.inputs.Statistics`) that compress() reads.
        sequential: each layer is fitted to inputs that passed through the compressed earlier layers.
        correction: fraction of the errors of these blocks that the fits correct, see `Norms.outputs`; 0 if not sequential.
        shares_factors: the terms of one group share tensors.
    """

    needs: frozenset[str] = frozenset()
    sequential = False
    correction = 0.0
    shares_factors = False

    def groups(self, specs: Sequence[LinearSpec]) -> list[list[LinearSpec]]:
        """Groups of matrices that are compressed together. Each matrix is in one group; by default, each is alone."""
        return [[spec] for spec in specs]

    @abstractmethod
    def plan(self, shapes: Sequence[Shape], bits: int, dtype: torch.dtype) -> list[Term]:
        """Terms without values, of the sizes that `bits` allow for a group. If a matrix gets nothing, its count() is 0."""

    @abstractmethod
    def least_bits(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        """Bits of the smallest terms that a group can have."""

    @abstractmethod
    def compress(
        self, weights: Sequence[Tensor], bits: int, statistics: Sequence[Statistics], generator: torch.Generator
    ) -> list[Fit]:
        """The fits of the weights (out, in) of a group, of any floating type. Together they take at most `bits` bits.

        Raises:
            NonFiniteError: a weight or a fit has NaN or infinite values.
        """

    def start_flops(self, term: Term) -> int:
        """Floating-point operations of the start of the fit of one matrix."""
        return 0

    def step_flops(self, term: Term) -> int:
        """Floating-point operations of one step of the fit of one matrix."""
        return 0

    @property
    def steps(self) -> int:
        """The largest number of steps of a fit."""
        return 0


class MatrixMethod(Method):
    """A method that compresses each matrix alone. `plan_matrix` gives the size of its term; `start` computes the term.

    A matrix that gets the bits of its dense form stays dense.
    """

    @abstractmethod
    def plan_matrix(self, out_features: int, in_features: int, bits: int, dtype: torch.dtype) -> Term:
        """The term without values, of the size that `bits` allow."""

    @abstractmethod
    def start(self, objective: Objective, planned: Term, generator: torch.Generator) -> Start:
        """A term of the planned size with a small error in the objective's norm."""

    def find(self, objective: Objective, planned: Term, generator: torch.Generator) -> Solution:
        """The fitted term. The default returns the start, which must be the optimum."""
        start = self.start(objective, planned, generator)
        assert start.optimum is not None
        return Solution(start.term, [(0, start.optimum)], 0, Status.OPTIMAL, start.optimum)

    def objective(self, norms: Norms) -> Objective:
        """The norm in which the method minimises the error. The default is the plain one, ||W' - W||."""
        return norms.plain

    def plan(self, shapes: Sequence[Shape], bits: int, dtype: torch.dtype) -> list[Term]:
        ((m, n),) = shapes
        return [Dense.empty(m, n, dtype) if bits >= dense_bits(m, n, dtype) else self.plan_matrix(m, n, bits, dtype)]

    def compress(
        self, weights: Sequence[Tensor], bits: int, statistics: Sequence[Statistics], generator: torch.Generator
    ) -> list[Fit]:
        (weight,), (known,) = weights, statistics
        return [self.compress_matrix(weight.detach(), bits, known, generator)]

    def compress_matrix(self, weight: Tensor, bits: int, statistics: Statistics, generator: torch.Generator) -> Fit:
        """The fit of one weight. It is first scaled to a root mean square of 1, so that settings do not depend on its size."""
        begun, (m, n) = time.perf_counter(), weight.shape
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError("the weight holds NaN or infinite values")
        (planned,) = self.plan([(m, n)], bits, weight.dtype)
        scale = 1.0 if isinstance(planned, Dense) else float(weight.double().square().mean().sqrt())
        unit = weight.float() / (scale or 1.0)
        norms = Norms(unit, statistics, self.correction)
        objective = norms.plain if scale == 0 else self.objective(norms)
        with PeakMemory(weight.device) as memory:
            if scale == 0:
                solution = Solution(nothing(m, n, unit.dtype, unit.device), [(0, 0.0)], 0, Status.ZERO, 0.0)
            elif isinstance(planned, Dense):
                solution = Solution(Dense(unit), [(0, 0.0)], 0, Status.DENSE, 0.0)
            else:
                solution = self.find(objective, planned, generator)
        stored = solution.term.scaled(scale or 1.0).as_stored(weight.dtype)
        if not stored.is_finite():
            raise NonFiniteError(f"the fitted numbers overflow {weight.dtype}; use dtype=bfloat16 or float32")
        return Fit(
            term=stored,
            n_params=stored.count(),
            bits=stored.bits(),
            status=" ".join(filter(None, (solution.status.code, objective.note))),
            losses=solution.losses,
            optimum=solution.optimum,
            **measured(norms, stored, scale or 1.0, equal_rank(m, n, bits, weight.dtype)),  # type: ignore[arg-type]
            steps=solution.steps,
            flops=0 if isinstance(planned, Dense) else self.start_flops(planned) + solution.steps * self.step_flops(planned),
            seconds=time.perf_counter() - begun,
            peak_bytes=memory.peak_bytes,
        )


def require_correction(correction: float, sequential: bool) -> None:
    """Check the setting `method.correction`.

    Raises:
        UserError: it is not a fraction, or there is nothing to correct.
    """
    if not isinstance(correction, int | float) or not 0 <= correction <= 1:
        raise UserError(f"method.correction={correction} must be a number from 0 to 1")
    if correction and not sequential:
        raise UserError("method.correction is about the errors of compressed earlier layers; add method.sequential=true")
