"""B-spline kernels, which have compact support. Degree 1 is the hat function, a piecewise linear kernel."""

from math import comb, factorial

import torch
from torch import Tensor

from nla.kernels.related import DifferenceKernel
from nla.machine.errors import require_choice


class Spline(DifferenceKernel):
    """W'[i, j] = sum_l mu_l prod_k beta(A_ilk - B_jlk), beta the centred cardinal B-spline of `degree` (Schoenberg, 1946).

    beta is a sum of shifted powers: beta(d) = sum_k (-1)^k C(n+1, k) max(0, (n+1)/2 - k - |d|)^n / n!. Its support is
    |d| < (n+1)/2. It is even, so only the knots right of 0 are needed.
    """

    def __init__(self, degree: int = 2, r: int = 1, min_h: int = 1) -> None:
        super().__init__(r, min_h)
        require_choice("kernel.degree", degree, [1, 2, 3])
        self.degree = degree
        self.knots = [
            ((degree + 1) / 2 - k, (-1) ** k * comb(degree + 1, k) / factorial(degree))
            for k in range(degree + 1)
            if (degree + 1) / 2 - k > 0
        ]

    @property
    def name(self) -> str:
        return f"spline{self.degree}"

    def entry(self, a: Tensor, b: Tensor) -> Tensor:
        d, n = (a - b).abs(), self.degree
        if n == 1:
            value = (1 - d).clamp(min=0)
        elif n == 2:
            value = torch.where(d < 0.5, 0.75 - d**2, (1.5 - d).clamp(min=0) ** 2 / 2)
        else:
            value = torch.where(d < 1, 2 / 3 - d**2 + d**3 / 2, (2 - d).clamp(min=0) ** 3 / 6)
        return value.prod(-1)

    def beta(self, d: Tensor, power: int) -> Tensor:
        """sum over knots of coefficient * max(0, knot - |d|)^power."""
        size, total = d.abs(), torch.zeros_like(d)
        for knot, coefficient in self.knots:
            total.add_((knot - size).clamp_(min=0).pow_(power), alpha=coefficient)
        return total

    def value(self, z: Tensor) -> Tensor:
        return self.beta(z, self.degree).prod(-1) if z.shape[-1] > 1 else self.beta(z, self.degree).squeeze(-1)

    def slope(self, z: Tensor, k: Tensor) -> Tensor:
        if self.degree == 1:  # beta() with power 0 would be wrong outside the support, because 0^0 = 1
            size = z.abs()
            own = -sum(c * (size < knot).to(z.dtype) for knot, c in self.knots) * z.sign()
        else:
            own = self.beta(z, self.degree - 1).mul_(-self.degree).mul_(z.sign())
        if z.shape[-1] == 1:
            return own
        beta = self.beta(z, self.degree)
        for column in range(z.shape[-1]):
            others = torch.cat((beta[..., :column], beta[..., column + 1 :]), -1)
            own[..., column] *= others.prod(-1)
        return own
