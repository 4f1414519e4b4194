"""The sigmoid kernel: a logistic function of an inner product."""

import torch
from torch import Tensor

from nla.kernels.related import ProductKernel


class Sigmoid(ProductKernel):
    """W'[i, j] = sum_l mu_l / (1 + exp(-<A_il, B_jl>))."""

    def entry(self, a: Tensor, b: Tensor) -> Tensor:
        return 1 / (1 + (-(a * b).sum(-1)).exp())

    def value(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z)

    def slope(self, z: Tensor, k: Tensor) -> Tensor:
        return k * (1 - k)
