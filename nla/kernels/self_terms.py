"""The closed-form fit of the piecewise kernel: an SVD, and a small nonlinear system for the self-terms.

The smallest error. The kernel's matrix is s_out 1^T + 1 s_in^T + M with the self-terms s_out and s_in and rank M <= R = h*r.
If the self-terms were free, the best M would be the rank-R SVD of the doubly centred weight (rows and columns of mean zero),
and the error would be the tail of that SVD (Eckart-Young). No piecewise fit is below it. In the norm ||(W' - W) S|| the
same holds for W S, centred against 1 from the left and against S^T 1 from the right.

How it is reached. M = -2 a b^T leaves R x R free parameters: A = a G and B = b G^-T D give the same M for every invertible G,
with D = diag(signs of mu). Moving all rows of b by -e/2 adds only a row and a column term. With P = G D G^T the self-terms are

    s_out[i] = a_i^T P a_i + a_i . e        s_in[j] = (b_j - e/2)^T P^-1 (b_j - e/2)

These are R (R + 1) / 2 + R unknowns for out + in equations: s_out must be the row means and s_in the column means of the
weight. Levenberg-Marquardt in its dual form solves them, with one Cholesky factorisation of size out + in per step. If the
unknowns are too few (R below about sqrt(2 (out + in))), the least-squares solution is returned, and gradient descent
continues from it.
"""

import math
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from nla.matrix.objective import Objective
from nla.matrix.spectrum import balanced_factors
from nla.matrix.triplets import Triplets, alternating_signs

FIRST_SIZES = (1.0, 0.5, 2.0)  # of the first gauge P, relative to the one that balances rows and columns; tried in this order
SOLVED = 1e-11  # relative squared error of the self-terms at which they count as solved
MAX_STEPS = 60
STALLED = 5  # steps in a row that lower the squared residual by less than 1 %
AT_OPTIMUM = 1e-4  # relative excess over the optimum that needs no further try
RIDGE = 1e-3  # added to the diagonal of the Gram matrix, relative to its mean


def fit_self_terms(objective: Objective, h: int, r: int) -> tuple[Triplets, float]:
    """Piecewise triplets for the objective's weight (out, in), and the smallest relative squared error of any such triplets.

    In the norm of the outputs, the means of rows are taken with RIDGE, so that the smallest error may be a little lower: by
    0.14 % for inputs that nearly add up to zero, and by less than a millionth for others that were tried.
    """
    w = objective.weight.double()
    m, n = w.shape
    S = torch.eye(n, dtype=w.dtype, device=w.device) if objective.wide_root is None else objective.wide_root
    G = S @ S.T
    G.diagonal().add_(RIDGE)  # after a LayerNorm inputs add up to zero, so s_out 1^T hardly changes the outputs
    reach = G.sum()
    mean_in = G.sum(1) / reach  # (in,): weights of the mean of a row; their sum is 1, and in the plain norm each is 1 / in
    column = w.mean(0)
    above = w - column
    row = above @ mean_in
    centred = above - row[:, None]  # orthogonal to every s_out 1^T and 1 s_in^T in the objective's norm
    inner = Objective(centred, objective.factor).spectrum
    optimum = inner.energy * inner.tail(h * r) / (objective.spectrum.energy or 1.0)

    left, right = balanced_factors(inner, h * r)
    ratio = (m / n) ** 0.25
    a, b = left * (ratio / 2**0.5), right * (-1 / ratio / 2**0.5)  # -2 a b^T is the truncated SVD
    signs = alternating_signs(h, w).repeat_interleave(r)
    best, least = None, math.inf
    # An exact solution is exact in every norm. The plain norm comes first: a nearly singular S would give some equations
    # hardly any weight. The objective's own norm and other sizes of the first gauge follow, if no solution so far is exact.
    norms = [torch.ones_like(column)] if objective.factor is None else [torch.ones_like(column), G.diagonal()]
    for size, inputs in product(FIRST_SIZES, norms):
        weights = torch.cat(((inputs.sum()).sqrt().expand(m), (m * inputs).sqrt()))
        equations = SelfTerms(a, b, row, column, weights)
        gauge = solve(equations, equations.begin(signs * size), float((w.square() @ inputs).sum()))
        excess = equations.excess(gauge, S) / (objective.energy or 1.0)
        if excess < least:
            best, least = gauge, excess
        if least <= AT_OPTIMUM * optimum:
            break
    assert best is not None
    return best.triplets(a, b, h, r).map(lambda p: p.to(objective.weight.dtype)), optimum


@dataclass(frozen=True)
class Gauge:
    """Parameters that change self-terms but not M: P (R, R) symmetric, e (R,), and a constant c moved from s_in to s_out."""

    P: Tensor
    e: Tensor
    c: float

    def triplets(self, a: Tensor, b: Tensor, h: int, r: int) -> Triplets:
        """The triplets A = a G and B = (b - e/2) G^-T D with G D G^T = P. Columns of equal sign are side by side."""
        values, vectors = torch.linalg.eigh(self.P)
        scale, signs = values.abs().sqrt(), values.sign()
        A = (a @ vectors) * scale
        B = ((b - self.e / 2) @ vectors) * (signs / scale)
        return Triplets(A.unflatten(1, (h, r)), B.unflatten(1, (h, r)), signs.unflatten(0, (h, r))[:, 0])


@dataclass(frozen=True)
class SelfTerms:
    """The equations for the self-terms. The sum of their squared, weighted residuals is a squared error of the matrix."""

    a: Tensor  # (out, R)
    b: Tensor  # (in, R)
    row: Tensor  # (out,): required s_out, up to c
    column: Tensor  # (in,): required s_in, up to -c
    weights: Tensor  # (out + in,): an error of s_out[i] affects all of row i of the matrix, one of s_in[j] all of column j

    def begin(self, signs: Tensor) -> Gauge:
        """The start P = diag(signs * p). p balances what each column of a and b adds to s_out and to s_in.

        In a weighted norm b contains S^-1 and is smaller than a by orders of magnitude. With p = 1 the first residual would be
        thousands of times as large as the matrix, and the solver would fail.
        """
        m = len(self.row)
        on_rows = torch.linalg.vector_norm(self.weights[:m, None] * self.a.square(), dim=0)
        on_columns = torch.linalg.vector_norm(self.weights[m:, None] * self.b.square(), dim=0)
        p = torch.where((on_rows > 0) & (on_columns > 0), (on_columns / on_rows).sqrt(), 1.0)
        return Gauge(torch.diag(signs * p), torch.zeros_like(signs), 0.0)

    def residual(self, gauge: Gauge) -> tuple[Tensor, Tensor]:
        """The weighted residuals (out + in,), and H = (b - e/2) P^-1 (in, R)."""
        moved = self.b - gauge.e / 2
        H = torch.linalg.solve(gauge.P, moved.T).T
        s_out = ((self.a @ gauge.P) * self.a).sum(1) + self.a @ gauge.e
        s_in = (H * moved).sum(1)
        return self.weights * torch.cat((s_out - self.row - gauge.c, s_in - self.column + gauge.c)), H

    def excess(self, gauge: Gauge, S: Tensor) -> float:
        """||D S||^2, the squared error from inexact self-terms: D[i, j] is the error of s_out[i] plus that of s_in[j]."""
        residual, _ = self.residual(gauge)
        off = residual / self.weights
        return float(((off[: len(self.row), None] + off[None, len(self.row) :]) @ S).square().sum())

    def normal_matrix(self, H: Tensor) -> Tensor:
        """J J^T (out + in, out + in) for the Jacobian J of the residuals, in fp32, which suffices for a step direction.

        Before weighting, the derivative of row i's residual is (f f^T, f, -1) with f = a_i. That of column j's is minus
        (f f^T, f, -1) with f = H_j. Two such vectors have the inner product (f . f')^2 + f . f' + 1.
        """
        m = len(self.row)
        f = torch.cat((self.a, H)).float()
        inner = f @ f.T
        K = inner.square().add_(inner).add_(1)
        weights = self.weights.float()
        weights[m:] *= -1
        return K.mul_(weights[:, None]).mul_(weights)

    def change(self, y: Tensor, H: Tensor) -> Gauge:
        """J^T y, the changes of P, e and c, for multipliers y (out + in,)."""
        m = len(self.row)
        y = self.weights * y
        on_rows, on_columns = y[:m], y[m:]
        P = self.a.T @ (on_rows[:, None] * self.a) - H.T @ (on_columns[:, None] * H)
        e = self.a.T @ on_rows - H.T @ on_columns
        return Gauge(P, e, float(on_columns.sum() - on_rows.sum()))


def solve(equations: SelfTerms, gauge: Gauge, energy: float) -> Gauge:
    """The least-squares solution by Levenberg-Marquardt. The damping falls after a step that reduces the error, or else rises.

    Args:
        energy: squared norm of the weight; the solver stops at a squared residual of SOLVED times this.
    """
    residual, H = equations.residual(gauge)
    negative = int((torch.linalg.eigvalsh(gauge.P) < 0).sum())
    error, damping, small_steps = residual.square().sum(), 1e-5, 0
    K = equations.normal_matrix(H)
    for _ in range(MAX_STEPS):
        if error <= SOLVED * energy or damping > 1e3 or small_steps == STALLED:
            break
        shifted = K.clone()
        shifted.diagonal().add_(damping * float(K.diagonal().mean()))
        factor, failed = torch.linalg.cholesky_ex(shifted)
        if not failed:
            y = torch.cholesky_solve(-residual.float()[:, None], factor)[:, 0].double()
            step = equations.change(y, H)
            trial = Gauge(gauge.P + step.P, gauge.e + step.e, gauge.c + step.c)
            # P must keep its number of negative eigenvalues, because that is the number of negative mu
            if int((torch.linalg.eigvalsh(trial.P) < 0).sum()) == negative:
                trial_residual, trial_H = equations.residual(trial)
                trial_error = trial_residual.square().sum()
                if trial_error < error:
                    # A single small step is no end: the first accepted step after the damping has risen often is one.
                    small_steps = small_steps + 1 if trial_error > 0.99 * error else 0
                    gauge, residual, H, error = trial, trial_residual, trial_H, trial_error
                    damping = max(damping / 10, 1e-6)
                    K = equations.normal_matrix(H)
                    continue
        damping *= 10
    return gauge


def fit_self_terms_flops(out_features: int, in_features: int, rank: int) -> int:
    """Floating-point operations of fit_self_terms() without its SVD, for eight steps, a usual number."""
    size = out_features + in_features
    return 8 * (size**3 // 3 + 2 * size * size * rank + 4 * size * rank * rank + 9 * rank**3)
