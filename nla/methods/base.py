"""The contract of a compression method, and what every fit reports."""

import time
from abc import ABC, abstractmethod
from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor

from nla.errors import NonFiniteError
from nla.kernels.base import Kernel, random_like
from nla.linalg import Spectrum
from nla.memory import PeakMemory
from nla.solvers.gradient import Solution, Status
from nla.triplets import Triplets, triplet_size


@dataclass(frozen=True)
class Fit:
    """One compressed matrix. Errors are relative squared errors, ||W' - W||^2 / ||W||^2.

    Attributes:
        terms: W' is the sum over them.
        status: how the fit ended, a sentence.
        losses: (step, error) as the fit went on.
        relative_error: of the terms as stored.
        svd_error: of truncated SVD with as many parameters.
        floor: no matrix of a rank that the terms can have is below it (Eckart-Young); 0 where the kernel does not bound rank.
        optimum: the smallest error the kernel can reach at this size, where theory knows it.
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
    steps: int
    flops: int
    seconds: float
    peak_bytes: int

    @property
    def n_params(self) -> int:
        return sum(t.count() for _, t in self.terms)


class Method(ABC):
    """Compresses one weight matrix to a budget of parameters with triplets of one kernel."""

    kernel: Kernel

    @abstractmethod
    def find(
        self, weight: Tensor, spectrum: Spectrum, h: int, r: int, generator: torch.Generator, measured: ExitStack
    ) -> Solution:
        """Triplets for a finite fp32 weight (out, in) of unit root mean square, and its spectrum.

        While `measured` is open, peak memory is measured; whoever knows that it cannot rise any more may close it.
        """

    @abstractmethod
    def start_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        """Operations of find() before its first step."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Steps that find() may take at most."""

    def compress(self, weight: Tensor, n_params: int, generator: torch.Generator) -> Fit:
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
        spectrum, memory = Spectrum(w), PeakMemory(weight.device)
        with ExitStack() as measured:
            measured.enter_context(memory)
            if scale == 0:
                nothing = random_like(self.kernel, w, h, r, generator).scaled(0)
                solution = Solution(nothing, [(0, 0.0)], 0, Status.ZERO, 0.0)
            else:
                solution = self.find(w, spectrum, h, r, generator, measured)
        triplets = self.kernel.canonical(solution.triplets.scaled(scale))
        stored = triplets.prune(triplets.mu != 0).map(lambda p: p.to(weight.dtype))
        if not all(bool(torch.isfinite(p).all()) for p in (stored.A, stored.B, stored.mu)):
            raise NonFiniteError(f"the triplets overflow {weight.dtype}; use dtype=bfloat16 or float32")
        seen = stored.map(Tensor.float).scaled(1 / (scale or 1.0))
        squared_error, _ = self.kernel.squared_error(seen, w, torch.float32)
        rank = self.kernel.rank_bound(h, r)
        return Fit(
            terms=((self.kernel, stored),),
            status=solution.status.value,
            losses=solution.losses,
            relative_error=float(squared_error) / w.numel() if scale else 0.0,
            svd_error=spectrum.tail(n_params // triplet_size(m, n, 1)),
            floor=0.0 if rank is None else spectrum.tail(rank),
            optimum=solution.optimum,
            steps=solution.steps,
            flops=self.start_flops(m, n, h, r) + solution.steps * self.kernel.fit_flops(m, n, h, r),
            seconds=time.perf_counter() - begun,
            peak_bytes=memory.peak_bytes,
        )
