"""Terms in training whose codes do not change. Their values are in memory, so that they are not decoded in each step."""

import torch
from torch import Tensor, ones_like

from nla.terms.grid import Grid
from nla.terms.lattice_term import LatticeTerm


class UnpackedGrid(Grid):
    """A grid, and the values of its codes (out, in) in units of the scales."""

    values: Tensor

    def __init__(self, grid: Grid) -> None:
        super().__init__(grid.codes, grid.zeros, grid.scales, grid.in_features, grid.form)
        units = Grid(grid.codes, grid.zeros, ones_like(grid.scales), grid.in_features, grid.form)
        self.register_buffer("values", units.dense().detach(), persistent=False)

    def dense(self) -> Tensor:
        return self.values * self.scales.repeat_interleave(self.group_sizes(), 1)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense().to(x.dtype).T

    def packed(self) -> Grid:
        """The grid whose scales are again numbers of SCALE_BITS bits, as before the training."""
        scales = self.scales.to(torch.bfloat16).to(self.scales.dtype)
        return Grid(self.codes, self.zeros, scales, self.in_features, self.form)


class UnpackedLattice(LatticeTerm):
    """A lattice term, and its matrix (out, in) in units of the scale."""

    matrix: Tensor

    def __init__(self, term: LatticeTerm) -> None:
        super().__init__(term.codes, term.scale, term.seed, term.in_features)
        unit = LatticeTerm(term.codes, ones_like(term.scale), term.seed, term.in_features)
        self.register_buffer("matrix", unit.dense().detach(), persistent=False)

    def dense(self) -> Tensor:
        return self.matrix * self.scale

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.dense().to(x.dtype).T

    def packed(self) -> LatticeTerm:
        return LatticeTerm(self.codes, self.scale, self.seed, self.in_features)
