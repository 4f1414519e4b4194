"""Round to nearest (RTN): the best scale and zero point of each group of weights, and the nearest codes."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from nla.codes.grid_format import GridFormat
from nla.matrix.parts import TILE, slices

STARTS = 38  # about how many scales are tried for a group at once
ROUNDS = 3  # of codes for the scale, then the best scale for the codes; neither raises the error


class Scaling(NamedTuple):
    """Scales and zero points of the groups of a matrix, each (out, groups), fp32."""

    scales: Tensor
    zeros: Tensor

    def of_inputs(self, inputs: Tensor, group: int) -> "Scaling":
        """Scales and zero points of these inputs (k,): each (out, k)"""
        return Scaling(*(part[:, inputs // group] for part in self))


class Rounded(NamedTuple):
    """A matrix on a grid: codes (out, in) and the scaling of its groups, fp32."""

    codes: Tensor
    scaling: Scaling

    def dense(self, form: GridFormat) -> Tensor:
        """The matrix (out, in), fp32."""
        wide = self.scaling.of_inputs(torch.arange(self.codes.shape[1], device=self.codes.device), form.group)
        return wide.scales * form.levels.values(self.codes, wide.zeros)


def nearest_codes(weight: Tensor, scaling: Scaling, form: GridFormat) -> Tensor:
    """The codes of the levels nearest to the weights, fp32; the scaling has one column for each weight: all (out, k)."""
    return form.levels.nearest(weight / torch.where(scaling.scales > 0, scaling.scales, 1.0), scaling.zeros)


def best_scaling(weight: Tensor, form: GridFormat, importance: Tensor | None = None) -> Scaling:
    """Scales and zero points with a small squared error of the nearest codes.

    Args:
        weight: (out, in), fp32.
        importance: (in,), what the squared error of each input counts; None if all count alike.
    """
    m, n = weight.shape
    counts = torch.ones(n, device=weight.device) if importance is None else (importance / importance.mean()).to(weight)
    missing = (0, -n % form.group)
    groups = pad(weight, missing).view(m, -1, form.group)
    counts = pad(counts, missing).view(-1, form.group)
    parts = [best_of_rows(groups[rows], form, counts) for rows in slices(m, TILE[weight.device.type] // (STARTS * n))]
    return Scaling(*(torch.cat(part) for part in zip(*parts, strict=True)))


def best_of_rows(groups: Tensor, form: GridFormat, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Scales and zeros (rows, groups) of weights (rows, groups, group), of which each counts (groups, group) in the error.

    The starts of the levels are tried. Each is judged after its scale was fitted to its codes by least squares.
    """

    def fitted(scales: Tensor, zeros: Tensor) -> tuple[Tensor, Tensor]:
        """The best scale for the nearest codes, and by how much it lowers the squared error from that of a scale of 0."""
        values = form.levels.values(form.levels.nearest(groups / torch.where(scales > 0, scales, 1.0), zeros), zeros)
        weighted = values * counts
        along, size = (weighted * groups).sum(-1, keepdim=True), (weighted * values).sum(-1, keepdim=True)
        scale = torch.where(size > 0, along / size, 0.0).clamp_(min=0)
        return scale, scale * (2 * along - scale * size)

    scales, zeros = form.levels.starts(groups)
    scales, gains = fitted(scales, zeros)
    best = gains.argmax(0, keepdim=True)
    best_scale, best_zero = (part.take_along_dim(best, 0)[0] for part in (scales, zeros))
    for _ in range(ROUNDS):
        best_scale, _ = fitted(best_scale, best_zero)
    return best_scale.squeeze(-1), best_zero.squeeze(-1)


def rounded_to_nearest(weight: Tensor, form: GridFormat, importance: Tensor | None = None) -> Rounded:
    """RTN of a weight (out, in), fp32; `importance` as in best_scaling."""
    scaling = best_scaling(weight, form, importance)
    wide = scaling.of_inputs(torch.arange(weight.shape[1], device=weight.device), form.group)
    return Rounded(nearest_codes(weight, wide, form), scaling)
