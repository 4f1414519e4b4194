"""Rounding of a matrix to lattice points, eight inputs at a time: with error feedback (block LDLQ), then by descent."""

from typing import NamedTuple

import torch
from torch import Tensor

from nla.codes.damped import damped, upper_factor
from nla.codes.lattice_format import BLOCK, RowFormat
from nla.machine.peak_memory import measured_once
from nla.matrix.parts import slices

CHUNK = 128  # inputs between two uses of all earlier errors
MULTIPLES = (0.95, 1.0, 1.05, 1.1, 1.15, 1.2)  # of the size of the weight; feedback widens what is rounded
SWEEPS = 10  # the default of the authors' code


class RoundedToLattice(NamedTuple):
    """scale * values of the codes: uint8 (rows, bytes), of `RowFormat`."""

    codes: Tensor
    scale: float


def block_ldlq(weight: Tensor, hessian: Tensor, form: RowFormat) -> RoundedToLattice:
    """The rounding W' of a weight W (rows, n) that makes tr((W' - W) H (W' - W)^T) small, where H is damped.

    Source: Tseng et al., "QuIP#", ICML 2024, section 4.1, and the damping and the sweeps of the authors' code. Of several
    scales, that with the smallest error before the sweeps is taken.

    Args:
        weight: fp32; n is a multiple of eight.
        hessian: H (n, n) before damping, fp64, positive semidefinite, not zero.
    """
    wide = damped(hessian)
    H, A = wide.to(weight.dtype), feedback(wide).to(weight.dtype)
    size = float(weight.double().square().mean().sqrt())
    found, least = None, torch.inf
    for number, multiple in enumerate(MULTIPLES):
        with measured_once(number):
            rounded, error = rounded_at(weight, A, size * multiple, form)
            loss = float(((error @ H) * error).sum(dtype=torch.float64))
        if loss < least:
            found, least = rounded, loss
    assert found is not None
    return swept(weight, H, found, form)


def rounded_at(weight: Tensor, A: Tensor, scale: float, form: RowFormat) -> tuple[RoundedToLattice, Tensor]:
    """The rounding with this scale, and its error E = W' - W (rows, n).

    Block k becomes W'_k = Q(W_k - sum_{j < k} E_j A_jk), where Q is rounding to the nearest vector. Then E (I + A) = N is what
    Q itself changes, and tr(E H E^T) = tr(N D N^T) if H = (I + A) D (I + A)^T.
    """
    E, codes = torch.zeros_like(weight), []
    for chunk in slices(weight.shape[1], CHUNK):
        before = slice(0, chunk.start)
        targets = weight[:, chunk] - E[:, before] @ A[before, chunk]
        for block in slices(targets.shape[1], BLOCK):
            here = slice(chunk.start + block.start, chunk.start + block.stop)
            done = slice(chunk.start, here.start)
            vector, _ = form.vector(here.start // BLOCK)
            codes.append(vector.nearest((targets[:, block] - E[:, done] @ A[done, here]) / scale))
            E[:, here] = scale * vector.values(codes[-1]) - weight[:, here]
    return RoundedToLattice(torch.cat(codes, 1), scale), E


def swept(weight: Tensor, hessian: Tensor, rounded: RoundedToLattice, form: RowFormat) -> RoundedToLattice:
    """The rounding after `SWEEPS` passes of descent. No step raises tr((scale Q - W) H (scale Q - W)^T), Q the lattice points.

    A pass visits all vectors k. G = (Q - W / scale) H is half the gradient. The vector becomes the point nearest to its optimum
    given all others, Q_k - G_k H_kk^-1, in the rows where this lowers the loss: a step d changes it by d H_kk d^T + 2 d G_k^T.
    After each pass, the scale becomes the best one.
    """
    scale, codes = rounded.scale, rounded.codes.clone()
    Q = form.values(codes)
    target, product = weight @ hessian, Q @ hessian  # (rows, n)
    for sweep in range(SWEEPS):
        with measured_once(sweep):
            for number, block in enumerate(slices(weight.shape[1], BLOCK)):
                vector, place = form.vector(number)
                own, G = hessian[block, block], product[:, block] - target[:, block] / scale
                best = Q[:, block] - torch.linalg.solve(own, G, left=False)
                tried = vector.nearest(best)
                step = vector.values(tried) - Q[:, block]
                lower = (step * (step @ own + 2 * G)).sum(1, keepdim=True) < 0
                codes[:, place] = torch.where(lower, tried, codes[:, place])
                step = torch.where(lower, step, 0.0)
                Q[:, block] += step
                product += step @ hessian[block]
        along, square = ((other * Q).sum(dtype=torch.float64) for other in (target, product))
        if square > 0:
            scale = float(along / square)
    return RoundedToLattice(codes, scale)


def feedback(hessian: Tensor) -> Tensor:
    """A (n, n), fp64, zero except above the diagonal of blocks, with H = (I + A) D (I + A)^T and D of blocks.

    The block decomposition follows from H = R R^T, where R is upper triangular: I + A is R with each block of columns times
    the inverse of its block on the diagonal.
    """
    R = upper_factor(hessian)
    A = torch.zeros_like(R)
    for block in slices(len(R), BLOCK):
        above = slice(0, block.start)
        A[above, block] = torch.linalg.solve_triangular(R[block, block], R[above, block], upper=True, left=False)
    return A
