"""The phase kernel with a harmonic: each number holds two angles, a coarse and a fine one."""

import torch
from torch import Tensor

from nla.kernels.angles import AngleKernel, angles_of_pairs
from nla.kernels.factored import CoarseToFine
from nla.kernels.phase import Phase
from nla.machine.errors import require_integer, require_positive
from nla.matrix.objective import Objective
from nla.matrix.parts import widen
from nla.matrix.spectrum import mixed_factors
from nla.matrix.triplets import Triplets


class Harmonic(AngleKernel, CoarseToFine):
    """W'[i, j] = sum_l mu_l sum_k [cos(x) + weight cos(order x)], x = A_ilk - B_jlk. The rank is at most 4*h*r.

    One turn of the fine angle, order a, changes the coarse angle, a, by 2 pi / order only. So the two are nearly free of each
    other, and a number does the work of two. It needs the precision of two: order a must still be exact to a few degrees.

    Args:
        order: of the harmonic, a whole number from 2.
        weight: of the harmonic.
        r, min_h: see `Kernel`.

    Raises:
        UserError: an argument is out of range.
    """

    parts = 4

    def __init__(self, order: int, weight: float, r: int = 1, min_h: int = 1) -> None:
        super().__init__(r, min_h)
        require_integer("kernel.order", order, 2)
        require_positive("kernel.weight", weight)
        self.order, self.weight, self.coarse = order, weight, Phase(r, min_h)
        self.fitting_rate = 1 / order  # the fine angle turns so much faster
        self.training_rate = Phase.training_rate / order

    def entry(self, a: Tensor, b: Tensor) -> Tensor:
        x = a - b
        return (x.cos() + self.weight * (self.order * x).cos()).sum(-1)

    def factors(self, t: Triplets) -> tuple[Tensor, Tensor]:
        """Computed in fp32 at least: order a, rounded to bf16, would be wrong by many degrees."""
        A, B, mu = (widen(p) for p in (t.A.flatten(1), t.B.flatten(1), t.mu.repeat_interleave(t.r)))
        fine_A, fine_B, fine_mu = self.order * A, self.order * B, self.weight * mu
        left = (mu * A.cos(), mu * A.sin(), fine_mu * fine_A.cos(), fine_mu * fine_A.sin())
        right = (B.cos(), B.sin(), fine_B.cos(), fine_B.sin())
        return torch.cat(left, 1).to(t.A.dtype), torch.cat(right, 1).to(t.B.dtype)

    def features(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        fine = self.order * numbers
        g = torch.stack((numbers.cos(), numbers.sin(), fine.cos(), fine.sin()), 1)
        return g * g.new_tensor([1, 1, self.weight, self.weight]), g

    def warm_start(self, objective: Objective, h: int, r: int, generator: torch.Generator) -> tuple[Triplets, float | None]:
        return self.mixed_start(objective, h, r, generator), None

    def mixed_start(self, objective: Objective, h: int, r: int, generator: torch.Generator) -> Triplets:
        """Coarse and fine angles of the truncated SVD's factors in a random basis, half of the columns for each."""
        mixed = (f.to(objective.weight.dtype) for f in mixed_factors(objective.spectrum, 4 * h * r, generator))
        A, B = (self.number(*(angles_of_pairs(half, h, r) for half in f.split(2 * h * r, 1))) for f in mixed)
        return self.with_best_mu(A, B, objective)

    def finer(self, t: Triplets, rest: Objective, generator: torch.Generator) -> Triplets:
        """Coarse angles and mu of fitted triplets of phase; fine angles from what these leave of the matrix."""
        mixed = (f.to(rest.weight.dtype) for f in mixed_factors(rest.spectrum, 2 * t.h * t.r, generator))
        fine_A, fine_B = (angles_of_pairs(f, t.h, t.r) for f in mixed)
        turned = torch.where(t.mu < 0, torch.pi, 0.0)[:, None]  # of the harmonic too, mu is the coefficient
        return Triplets(self.number(t.A, fine_A + turned), self.number(t.B, fine_B), t.mu)

    def number(self, coarse: Tensor, fine: Tensor) -> Tensor:
        """The number nearest to the coarse angle that has this fine angle."""
        turns = ((self.order * coarse - fine) / (2 * torch.pi)).round()
        return (fine + 2 * torch.pi * turns) / self.order
