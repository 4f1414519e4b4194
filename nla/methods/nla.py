"""The paper's method: triplets under a kernel, fitted by a solver."""

from contextlib import ExitStack

import torch
from torch import Tensor

from nla.kernels.base import Kernel
from nla.linalg import Spectrum
from nla.methods.base import Method
from nla.solvers.gradient import GradientFit, Solution


class NLA(Method):
    """Nonlinear low-rank approximation: any kernel, any solver."""

    def __init__(self, kernel: Kernel, solver: GradientFit) -> None:
        self.kernel, self.solver = kernel, solver

    def find(
        self, weight: Tensor, spectrum: Spectrum, h: int, r: int, generator: torch.Generator, measured: ExitStack
    ) -> Solution:
        return self.solver.fit(self.kernel, weight, spectrum, h, r, generator, measured)

    def start_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        return self.kernel.warm_start_flops(out_features, in_features, h, r) if self.solver.start == "warm" else 0

    @property
    def steps(self) -> int:
        return self.solver.steps
