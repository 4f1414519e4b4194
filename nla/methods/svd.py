"""Truncated SVD in the norm of the method: the baseline of baselines, and what the others weigh differently."""

from contextlib import ExitStack

import torch

from nla.kernels.linear import Linear
from nla.matrix.objective import Objective
from nla.matrix.spectrum import spectrum_flops
from nla.matrix.triplets import Triplets
from nla.methods.base import Method
from nla.solvers.base import Solution, Status


class SVD(Method):
    """W' = U_R U_R^T W with U_R the first left singular vectors of W S: no matrix of rank R has a smaller ||(W' - W) S||.

    The linear kernel with h = R triplets of r = 1 and mu = the singular values. S = 1 here.
    """

    def __init__(self) -> None:
        self.kernel = Linear(r=1)

    def find(self, objective: Objective, h: int, r: int, generator: torch.Generator, measured: ExitStack) -> Solution:
        left, s, right = (factor.to(objective.weight.dtype) for factor in objective.spectrum.truncated(h))
        error = objective.spectrum.tail(h)
        return Solution(Triplets(left[:, :, None], right[:, :, None], s), [(0, error)], 0, Status.OPTIMAL, error)

    def start_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        return spectrum_flops(out_features, in_features)
