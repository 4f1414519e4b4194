"""The contract of a compression method."""

import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from nla.machine.errors import NonFiniteError
from nla.machine.peak_memory import PeakMemory
from nla.matrix.inputs import Statistics
from nla.matrix.objective import Norms, Objective
from nla.methods.fit import Fit, equal_rank, measured
from nla.models.select import LinearSpec
from nla.solvers.base import Solution, Start, Status
from nla.terms.base import Term

Shape = tuple[int, int]  # (out, in)


class Method(ABC):
    """Turns groups of weight matrices, and a budget of bits for each group, into one term for each matrix.

    A method that compresses each matrix alone implements `MatrixMethod`, which is shorter.

    Attributes:
        needs: names of the statistics (`nla.matrix.inputs.Statistics`) that compress() reads.
        sequential: later blocks are measured and fitted behind the compressed earlier ones.
        shares_factors: terms of one group share tensors.
    """

    needs: frozenset[str] = frozenset()
    sequential = False
    shares_factors = False

    def groups(self, specs: Sequence[LinearSpec]) -> list[list[LinearSpec]]:
        """Which matrices are compressed together; each is in one group. By default each is alone."""
        return [[spec] for spec in specs]

    @abstractmethod
    def plan(self, shapes: Sequence[Shape], bits: int, dtype: torch.dtype) -> list[Term]:
        """Terms of the sizes that so many bits buy for a group, without numbers. One that gets nothing has a count of 0."""

    @abstractmethod
    def least_bits(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        """Bits of the smallest terms that a group can have."""

    @abstractmethod
    def compress(
        self, weights: Sequence[Tensor], bits: int, statistics: Sequence[Statistics], generator: torch.Generator
    ) -> list[Fit]:
        """Fit the weights (out, in) of a group, of any floating type, in at most so many bits.

        Raises:
            NonFiniteError: a weight, or a fit, is not finite.
        """

    def start_flops(self, term: Term) -> int:
        """Operations of a fit of one matrix before its first step."""
        return 0

    def step_flops(self, term: Term) -> int:
        """Operations of one step of the fit of one matrix."""
        return 0

    @property
    def steps(self) -> int:
        """Steps that a fit may take at most."""
        return 0


class MatrixMethod(Method):
    """Compresses each matrix by itself. `plan_matrix` says the size of its term, `start` makes it."""

    @abstractmethod
    def plan_matrix(self, out_features: int, in_features: int, bits: int, dtype: torch.dtype) -> Term:
        """The term that so many bits buy, without numbers."""

    @abstractmethod
    def start(self, objective: Objective, planned: Term, generator: torch.Generator) -> Start:
        """A term of the planned size that makes the objective small."""

    def find(self, objective: Objective, planned: Term, generator: torch.Generator, memory: ExitStack) -> Solution:
        """The fitted term. By default it is the start, where that is the optimum.

        While `memory` is open, peak memory is measured. Whoever knows that it cannot rise any more may close it.
        """
        start = self.start(objective, planned, generator)
        assert start.optimum is not None
        return Solution(start.term, [(0, start.optimum)], 0, Status.OPTIMAL, start.optimum)

    def objective(self, norms: Norms) -> Objective:
        """What the method minimises."""
        return norms.plain

    def plan(self, shapes: Sequence[Shape], bits: int, dtype: torch.dtype) -> list[Term]:
        ((out_features, in_features),) = shapes
        return [self.plan_matrix(out_features, in_features, bits, dtype)]

    def compress(
        self, weights: Sequence[Tensor], bits: int, statistics: Sequence[Statistics], generator: torch.Generator
    ) -> list[Fit]:
        (weight,), (known,) = weights, statistics
        return [self.compress_matrix(weight.detach(), bits, known, generator)]

    def compress_matrix(self, weight: Tensor, bits: int, statistics: Statistics, generator: torch.Generator) -> Fit:
        """Fit one weight, scaled to a root mean square of 1, so that all settings mean the same for every matrix."""
        begun, (m, n) = time.perf_counter(), weight.shape
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError("the weight holds NaN or infinite values")
        planned = self.plan_matrix(m, n, bits, weight.dtype)
        scale = float(weight.double().square().mean().sqrt())
        unit = weight.float() / (scale or 1.0)
        norms = Norms(unit, statistics)
        objective = norms.plain if scale == 0 else self.objective(norms)
        memory = PeakMemory(weight.device)
        with ExitStack() as stack:
            stack.enter_context(memory)
            if scale == 0:
                solution = Solution(planned.zero(unit), [(0, 0.0)], 0, Status.ZERO, 0.0)
            else:
                solution = self.find(objective, planned, generator, stack)
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
            flops=self.start_flops(planned) + solution.steps * self.step_flops(planned),
            seconds=time.perf_counter() - begun,
            peak_bytes=memory.peak_bytes,
        )
