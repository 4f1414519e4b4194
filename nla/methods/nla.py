"""The paper's method: triplets under a kernel, fitted by a solver."""

from contextlib import ExitStack

import torch

from nla.kernels.base import Kernel
from nla.machine.errors import require_choice
from nla.matrix.objective import Norms, Objective
from nla.methods.base import Method
from nla.solvers.base import Solution
from nla.solvers.gradient import GradientFit


class NLA(Method):
    """Nonlinear low-rank approximation: any kernel, any solver.

    Args:
        loss: `weight` (the paper's, ||W' - W||^2) or `activation` (||(W' - W) X^T||^2 over the calibration tokens X).
    """

    def __init__(self, kernel: Kernel, solver: GradientFit, loss: str) -> None:
        require_choice("method.loss", loss, ["weight", "activation"])
        self.kernel, self.solver = kernel, solver
        self.needs = frozenset({"gram"} if loss == "activation" else ())

    def objective(self, norms: Norms) -> Objective:
        return norms.outputs if self.needs else norms.plain

    def find(self, objective: Objective, h: int, r: int, generator: torch.Generator, measured: ExitStack) -> Solution:
        return self.solver.fit(self.kernel, objective, h, r, generator, measured)

    def start_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        return self.kernel.warm_start_flops(out_features, in_features, h, r) if self.solver.start == "warm" else 0

    def step_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        weighting = self.kernel.weighting_flops(out_features, in_features, h, r) if self.needs else 0
        return self.kernel.fit_flops(out_features, in_features, h, r) + weighting

    @property
    def steps(self) -> int:
        return self.solver.steps
