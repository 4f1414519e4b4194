"""The polynomial kernel: a shifted power of an inner product."""

from torch import Tensor

from nla.errors import UserError, require_positive
from nla.kernels.tiled import ProductKernel


class Polynomial(ProductKernel):
    """W'[i, j] = sum_l mu_l (<A_il, B_jl> + c)^degree."""

    def __init__(self, degree: int = 2, c: float = 1.0, r: int = 1, min_h: int = 1) -> None:
        super().__init__(r, min_h)
        if degree < 1 or degree != int(degree):
            raise UserError(f"kernel.degree={degree} must be a whole number from 1")
        require_positive("kernel.c", c)
        self.degree, self.c = int(degree), c

    def value(self, z: Tensor) -> Tensor:
        return (z + self.c) ** self.degree

    def slope(self, z: Tensor, k: Tensor) -> Tensor:
        return self.degree * (z + self.c) ** (self.degree - 1)
