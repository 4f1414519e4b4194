"""The contract of a compression method, and what every fit reports."""

import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from nla.kernels.base import Kernel, random_like
from nla.machine.errors import NonFiniteError
from nla.machine.peak_memory import PeakMemory
from nla.matrix.inputs import Statistics
from nla.matrix.objective import Norms, Objective
from nla.matrix.triplets import Triplets, triplet_size
from nla.solvers.base import Solution, Status


@dataclass(frozen=True)
class Fit:
    """One compressed matrix. Errors are relative squared errors, ||W' - W||^2 / ||W||^2.

    Attributes:
        terms: W' is the sum over them.
        status: how the fit ended, as codes (`nla.solvers.base.in_words`).
        losses: (step, error) as the fit went on, in the norm that the method minimises.
        relative_error: of the terms as stored.
        svd_error: of truncated SVD with as many parameters.
        floor: no matrix of a rank that the terms can have is below it (Eckart-Young); 0 where the kernel does not bound rank.
        optimum: the smallest error the kernel can reach at this size in the method's norm, where theory knows it.
        weighted_error: ||(W' - W) X^T||^2 / ||W X^T||^2 over the calibration tokens X; None where no Gram matrix was needed.
        svd_llm_error: of SVD-LLM with as many parameters, the smallest weighted error of its rank.
        weighted_floor: as floor, of the weighted error.
        flops: counted operations of the start and all steps.
        seconds: wall time, one processor thread (or the GPU).
        peak_bytes: see PeakMemory.
    """

    terms: tuple[tuple[Kernel, Triplets], ...]
    status: str
    losses: list[tuple[int, float]]
    relative_error: float
    svd_error: float
    floor: float
    optimum: float | None
    weighted_error: float | None
    svd_llm_error: float | None
    weighted_floor: float | None
    steps: int
    flops: int
    seconds: float
    peak_bytes: int

    @property
    def n_params(self) -> int:
        return sum(t.count() for _, t in self.terms)


class Method(ABC):
    """Compresses one weight matrix to a budget of parameters with triplets of one kernel.

    Attributes:
        needs: names of the statistics (`nla.statistics.Statistics`) that compress() reads.
        sequential: later blocks are measured and fitted behind the compressed earlier ones.
    """

    kernel: Kernel
    needs: frozenset[str] = frozenset()
    sequential = False

    def objective(self, norms: Norms) -> Objective:
        """What the method minimises."""
        return norms.plain

    @abstractmethod
    def find(self, objective: Objective, h: int, r: int, generator: torch.Generator, measured: ExitStack) -> Solution:
        """Triplets that make the objective small.

        While `measured` is open, peak memory is measured; whoever knows that it cannot rise any more may close it.
        """

    @abstractmethod
    def start_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        """Operations of find() before its first step."""

    def step_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        """Operations of one step of find()."""
        return 0

    @property
    def steps(self) -> int:
        """Steps that find() may take at most."""
        return 0

    def compress(self, weight: Tensor, n_params: int, statistics: Statistics, generator: torch.Generator) -> Fit:
        """Fit `weight` (out, in), of any floating type, with at most n_params parameters of the same type.

        Raises:
            NonFiniteError: the weight, or the fit, is not finite.
        """
        begun, weight = time.perf_counter(), weight.detach()
        if not bool(torch.isfinite(weight).all()):
            raise NonFiniteError("the weight holds NaN or infinite values")
        m, n = weight.shape
        h, r = self.kernel.size(m, n, n_params)
        scale = float(weight.double().square().mean().sqrt())
        w = weight.float() / (scale or 1.0)
        memory = PeakMemory(weight.device)
        norms = Norms(w, statistics)
        objective = norms.plain if scale == 0 else self.objective(norms)
        with ExitStack() as measured:
            measured.enter_context(memory)
            if scale == 0:
                nothing = random_like(self.kernel, w, h, r, generator).scaled(0)
                solution = Solution(nothing, [(0, 0.0)], 0, Status.ZERO, 0.0)
            else:
                solution = self.find(objective, h, r, generator, measured)
        triplets = self.kernel.canonical(solution.triplets.scaled(scale))
        stored = triplets.prune(triplets.mu != 0).map(lambda p: p.to(weight.dtype))
        if not all(bool(torch.isfinite(p).all()) for p in (stored.A, stored.B, stored.mu)):
            raise NonFiniteError(f"the triplets overflow {weight.dtype}; use dtype=bfloat16 or float32")
        seen, rank = stored.map(Tensor.float).scaled(1 / (scale or 1.0)), self.kernel.rank_bound(h, r)
        equal = n_params // triplet_size(m, n, 1)
        error, svd_error, floor = self.errors(norms.plain, seen, equal, rank)
        weighted: tuple[float | None, ...] = (None, None, None)
        if statistics.gram is not None:
            weighted = self.errors(norms.outputs, seen, equal, rank)
        return Fit(
            terms=((self.kernel, stored),),
            status=" ".join(filter(None, (solution.status.code, objective.note))),
            losses=solution.losses,
            relative_error=error,
            svd_error=svd_error,
            floor=floor,
            optimum=solution.optimum,
            weighted_error=weighted[0],
            svd_llm_error=weighted[1],
            weighted_floor=weighted[2],
            steps=solution.steps,
            flops=self.start_flops(m, n, h, r) + solution.steps * self.step_flops(m, n, h, r),
            seconds=time.perf_counter() - begun,
            peak_bytes=memory.peak_bytes,
        )

    def errors(self, objective: Objective, t: Triplets, equal: int, rank: int | None) -> tuple[float, float, float]:
        """Of these triplets, of the best matrix of rank `equal`, and of the best of the rank that triplets can have."""
        squared_error, _ = self.kernel.squared_error(t, objective, torch.float32)
        error = float(squared_error) / objective.energy if objective.energy else 0.0
        spectrum = objective.spectrum
        return error, spectrum.tail(equal), 0.0 if rank is None else spectrum.tail(rank)
