"""The sigmoid kernel: a logistic function of an inner product."""

import torch
from torch import Tensor

from nla.kernels.tiled import ProductKernel


class Sigmoid(ProductKernel):
    """W'[i, j] = sum_l mu_l / (1 + exp(-<A_il, B_jl>))."""

    def value(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z)

    def slope(self, z: Tensor, k: Tensor) -> Tensor:
        return k * (1 - k)
