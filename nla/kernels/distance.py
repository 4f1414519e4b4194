"""The unsquared distance kernel of DyN and SNELL, from which the paper's kernel is derived."""

import torch
from torch import Tensor

from nla.kernels.related import DifferenceKernel
from nla.matrix.triplets import Triplets


class Distance(DifferenceKernel):
    """W'[i, j] = sum_l mu_l ||A_il - B_jl||. Its gradient is set to 0 where A_il = B_jl."""

    def entry(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().sum(-1).sqrt()

    def random_start(self, out_features: int, in_features: int, h: int, r: int, generator: torch.Generator) -> Triplets:
        """The start of difference kernels with a smaller mu, because distances do not fall to 0 as local kernels do."""
        return super().random_start(out_features, in_features, h, r, generator).scaled(1 / h**0.5)

    def value(self, z: Tensor) -> Tensor:
        return torch.linalg.vector_norm(z, dim=-1)

    def slope(self, z: Tensor, k: Tensor) -> Tensor:
        return z.div_(k.clamp(min=torch.finfo(k.dtype).tiny)[..., None])
