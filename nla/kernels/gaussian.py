"""The Gaussian kernel (the paper's kernel ablation)."""

from torch import Tensor

from nla.kernels.related import DifferenceKernel
from nla.machine.errors import require_positive


class Gaussian(DifferenceKernel):
    """W'[i, j] = sum_l mu_l exp(-||A_il - B_jl||^2 / (2 sigma^2))."""

    def __init__(self, sigma: float = 1.0, r: int = 1, min_h: int = 1) -> None:
        super().__init__(r, min_h)
        require_positive("kernel.sigma", sigma)
        self.sigma = sigma
        self.spread = 2.0 * sigma

    def entry(self, a: Tensor, b: Tensor) -> Tensor:
        return (-(a - b).square().sum(-1) / (2 * self.sigma**2)).exp()

    def value(self, z: Tensor) -> Tensor:
        # far below exp(-60) results become denormal numbers, on which a CPU is about ten times slower
        return z.square().sum(-1).mul_(-0.5 / self.sigma**2).clamp_(min=-60).exp_()

    def slope(self, z: Tensor, k: Tensor) -> Tensor:
        return z.mul_(k[..., None]).mul_(-1 / self.sigma**2)
