"""Least squares and error feedback for the factors of L R^T."""

import torch
from torch import Tensor

from nla.codes.feedback import feedback
from nla.codes.grid_format import GridFormat
from nla.codes.rounding import Rounded, Scaling, rounded_to_nearest
from nla.machine.peak_memory import unmeasured

RIDGE = 1e-10  # fraction of the mean of a diagonal that makes normal equations solvable if columns depend on each other


def refitted_left(weight: Tensor, right: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
    """The L (out, k) of the smallest ||(L R^T - W) S||, and the Hessian R^T G R (k, k) of each of its rows, fp64.

    Args:
        weight: W (out, in).
        right: R (in, k), fp64.
        seen: G R (in, k), fp64, where G = S S^T.
    """
    curvature = right.T @ seen
    return torch.linalg.solve(ridged(curvature), (weight.double() @ seen).T).T, curvature


def refitted_right(weight: Tensor, left: Tensor) -> Tensor:
    """The R (in, k) of the smallest ||(L R^T - W) S|| for any S that can be inverted, fp32. L: (out, k), fp64."""
    return torch.linalg.solve(ridged(left.T @ left), left.T @ weight.double()).T.to(weight)


def rounded_left(left: Tensor, curvature: Tensor, form: GridFormat) -> Rounded:
    """L^T (k, out) on a grid whose groups run along the columns of L, which are rounded one after another.

    The error of each column is made up for by those after it. Columns are rounded by falling diagonal of the Hessian, and
    have the best scaling for what they are when they are reached.

    Args:
        left: (out, k), fp64.
        curvature: the Hessian of a row of L (k, k), fp64.
    """
    order = curvature.diagonal().argsort(descending=True, stable=True)
    U = feedback(ridged(curvature)[order][:, order])
    rest, (k, out) = left.T[order].contiguous(), left.T.shape
    codes = torch.empty(k, out, device=left.device)
    scales, zeros = (torch.empty(k, form.groups(out), device=left.device) for _ in Scaling._fields)
    with unmeasured():
        for j in range(k):
            found = rounded_to_nearest(rest[j : j + 1].float(), form)
            codes[j], scales[j], zeros[j] = found.codes[0], found.scaling.scales[0], found.scaling.zeros[0]
            passed = (rest[j] - found.dense(form)[0].double()) / U[j, j]
            rest[j + 1 :].addr_(U[j, j + 1 :], passed, alpha=-1)
    back = order.argsort()
    return Rounded(codes[back], Scaling(scales[back], zeros[back]))


def ridged(matrix: Tensor) -> Tensor:
    """The symmetric matrix (k, k) with a small multiple of the identity; the identity itself if the matrix is zero."""
    size = float(matrix.diagonal().mean())
    return matrix + (RIDGE * size if size > 0 else 1.0) * torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
