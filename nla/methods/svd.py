"""Truncated SVD, the baseline of baselines."""

from contextlib import ExitStack

import torch
from torch import Tensor

from nla.kernels.linear import Linear
from nla.linalg import Spectrum, spectrum_flops
from nla.methods.base import Method
from nla.solvers.gradient import Solution, Status
from nla.triplets import Triplets


class SVD(Method):
    """W' = U_R diag(s_R) V_R^T: the linear kernel with h = R triplets of r = 1 and mu = the singular values."""

    def __init__(self) -> None:
        self.kernel = Linear(r=1)

    def find(
        self, weight: Tensor, spectrum: Spectrum, h: int, r: int, generator: torch.Generator, measured: ExitStack
    ) -> Solution:
        left, s, right = (factor.to(weight.dtype) for factor in spectrum.truncated(h))
        error = spectrum.tail(h)
        return Solution(Triplets(left[:, :, None], right[:, :, None], s), [(0, error)], 0, Status.OPTIMAL, error)

    def start_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        return spectrum_flops(out_features, in_features)

    @property
    def steps(self) -> int:
        return 0
