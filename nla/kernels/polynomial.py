"""The polynomial kernel: a shifted power of an inner product."""

from torch import Tensor

from nla.kernels.related import ProductKernel
from nla.machine.errors import require_integer, require_positive


class Polynomial(ProductKernel):
    """W'[i, j] = sum_l mu_l (<A_il, B_jl> + c)^degree."""

    def __init__(self, degree: int = 2, c: float = 1.0, r: int = 1, min_h: int = 1) -> None:
        super().__init__(r, min_h)
        require_integer("kernel.degree", degree, 1)
        require_positive("kernel.c", c)
        self.degree, self.c = degree, c

    def entry(self, a: Tensor, b: Tensor) -> Tensor:
        return ((a * b).sum(-1) + self.c) ** self.degree

    def value(self, z: Tensor) -> Tensor:
        return (z + self.c) ** self.degree

    def slope(self, z: Tensor, k: Tensor) -> Tensor:
        return self.degree * (z + self.c) ** (self.degree - 1)
