"""Coordinate descent on the codes of rounded triplets: each code in turn gets the value with the smallest error.

The kernel is bilinear in features of its numbers: k(a, b) = f(a) . g(b), with w features each; for phase (cos, sin). So the
matrix is sum_c L_c R_c^T over columns c of A and B, with L_c = rows mu_c f(A_c) (out, w) and R_c = columns g(B_c) (in, w), and
the error ||(W' - W) S||^2 is quadratic in each feature. Rows of A do not depend on each other. Rows of B do, by the Gram
matrix S S^T of the inputs.
"""

import torch
from torch import Tensor

from nla.kernels.factored import FactoredKernel
from nla.machine.peak_memory import unmeasured
from nla.matrix.objective import Objective
from nla.terms.rounded import RoundedTerm

TRIES = 3  # for each row of B: sets of codes that change together
SHARE = 0.3  # fraction of the improving codes in all but the last set
RIDGE = 1e-6  # of least squares, as a fraction of the mean of the diagonal


class Coordinates:
    """The codes, scales and features of a term, and methods that lower its error. No method raises it.

    Args:
        term: rounded triplets of a kernel with `features`.
    """

    def __init__(self, term: RoundedTerm, objective: Objective, generator: torch.Generator) -> None:
        self.term, self.objective, self.generator = term, objective, generator
        book, n = term.codebook, objective.weight.shape[1]
        values = book.values(torch.arange(2**book.width, device=objective.weight.device)).to(objective.weight)
        found = term.kernel.features(values)
        assert found is not None
        self.f, self.g = found  # (values, w) each
        self.a, self.b = (book.nearest(p.detach()).flatten(1) for p in (term.A, term.B))  # codes (out, c), (in, c)
        self.mu, self.rows, self.columns = (p.detach().clone() for p in (term.mu, term.rows, term.columns))
        self.gram = torch.eye(n).to(objective.weight) if objective.gram is None else objective.gram
        self.weighted = objective.weight @ self.gram  # (out, in)

    def left(self) -> Tensor:
        """(out, c, w)"""
        return self.f[self.a] * self.rows[:, None, None] * self.mu.repeat_interleave(self.term.r)[:, None]

    def right(self) -> Tensor:
        """(in, c, w)"""
        return self.g[self.b] * self.columns[:, None, None]

    def error(self) -> float:
        """||(W' - W) S||^2 / ||W S||^2"""
        matrix = self.left().flatten(1) @ self.right().flatten(1).T
        return float(self.objective.squared(matrix - self.objective.weight)[0]) / self.objective.energy

    def improve_a(self) -> None:
        """Each column of A in turn: all its codes become the best ones, given all other columns."""
        left, right = self.left(), self.right().flatten(1)
        w = left.shape[2]
        gram = right.T @ (self.gram @ right)  # (c w, c w)
        slope = self.weighted @ right - left.flatten(1) @ gram  # half the negative gradient, (out, c w)
        for column, mu in enumerate(self.mu.repeat_interleave(self.term.r).tolist()):
            own = slice(column * w, (column + 1) * w)
            scale = (self.rows * mu)[:, None]  # (out, 1)
            free = slope[:, own] + left[:, column] @ gram[own, own]  # the slope without this column
            curvature = ((self.f @ gram[own, own]) * self.f).sum(1)  # (values,)
            best = (scale * scale * curvature - 2 * scale * (free @ self.f.T)).argmin(1)
            new = self.f[best] * scale
            slope -= (new - left[:, column]) @ gram[own]
            left[:, column], self.a[:, column] = new, best

    def improve_b(self) -> None:
        """Each row of B in turn: sets of its codes become the best ones, if the error falls when all of a set change."""
        left, right = self.left().flatten(1), self.right()
        count, w = right.shape[1:]
        gram = left.T @ left  # (c w, c w)
        blocks = gram.unflatten(0, (count, w)).unflatten(2, (count, w)).diagonal(dim1=0, dim2=2).permute(2, 0, 1)  # (c, w, w)
        curvature = torch.einsum("vx,cxy,vy->cv", self.g, blocks, self.g)  # (c, values)
        slope = self.weighted.T @ left - self.gram @ (right.flatten(1) @ gram)  # half the negative gradient, (in, c w)
        diagonal = self.gram.diagonal()
        with unmeasured():
            for j in diagonal.argsort(descending=True, stable=True).tolist():
                weight, scale, row, codes = diagonal[j], self.columns[j], right[j], self.b[j]
                here = slope[j].clone()  # (c w,), half the negative gradient of this row of R
                moved = torch.zeros_like(row)  # (c, w), how far the row has moved
                for attempt in range(TRIES):
                    free = here.view(count, w) + weight * torch.einsum("cx,cxy->cy", row, blocks)  # without the column itself
                    costs = weight * scale * scale * curvature - 2 * scale * (free @ self.g.T)  # (c, values)
                    least, best = costs.min(1)
                    change = least < costs.gather(1, codes[:, None])[:, 0]
                    if attempt < TRIES - 1:
                        change &= (torch.rand(count, generator=self.generator) < SHARE).to(change.device)
                    step = (self.g[best] * scale - row) * change[:, None]
                    through = step.flatten() @ gram
                    if weight * (through @ step.flatten()) - 2 * (step.flatten() @ here) < 0:
                        row, codes = row + step, torch.where(change, best, codes)
                        here, moved = here - weight * through, moved + step
                slope.addr_(self.gram[:, j], moved.flatten() @ gram, alpha=-1)
                right[j], self.b[j] = row, codes

    def fit_scales(self) -> None:
        """Least squares for mu, then for the scales of rows, then for those of columns, given all codes."""
        r, h = self.term.r, len(self.mu)
        left, right = self.f[self.a] * self.rows[:, None, None], self.right()
        by_triplet = [p.unflatten(1, (h, r)).flatten(2) for p in (left, right)]  # (out, h, r w), (in, h, r w)
        a, b = (p.flatten(1) for p in by_triplet)  # (out, h r w), (in, h r w): W' = sum_l mu_l a_l b_l^T
        seen = self.gram @ b
        # (h, h): the products <a_l b_l^T, a_k b_k^T> in the norm of S, summed over the r w columns of each triplet
        normal = ((a.T @ a) * (b.T @ seen)).view(h, -1, h, a.shape[1] // h).sum((1, 3))
        self.mu = solved(normal, ((self.weighted @ b) * a).view(len(a), h, -1).sum((0, 2)))
        matrix = (self.f[self.a] * self.mu.repeat_interleave(r)[:, None]).flatten(1) @ right.flatten(1).T
        size = (matrix * (matrix @ self.gram)).sum(1)
        self.rows = torch.where(size > 0, (matrix * self.weighted).sum(1) / size, self.rows)
        matrix = self.left().flatten(1) @ self.g[self.b].flatten(1).T
        self.columns = solved((matrix.T @ matrix) * self.gram, (matrix * self.weighted).sum(0))

    def result(self) -> RoundedTerm:
        """The term of the current codes and scales."""
        book, like = self.term.codebook, self.term
        A, B = (book.values(codes).to(like.mu).view_as(p) for codes, p in ((self.a, like.A), (self.b, like.B)))
        return like.with_numbers(A, B, self.mu, self.rows, self.columns)


def solved(normal: Tensor, moment: Tensor) -> Tensor:
    """The solution x of `normal` x = `moment` with a small ridge, computed in fp64."""
    wide = normal.double()
    wide.diagonal().add_(RIDGE * float(wide.diagonal().mean()) or 1.0)  # 1 if all is zero: then so is x
    return torch.linalg.solve(wide, moment.double()).to(normal.dtype)


def improved(
    term: RoundedTerm, objective: Objective, rounds: int, generator: torch.Generator
) -> tuple[RoundedTerm, list[float]]:
    """The term after `rounds` of coordinate descent (A, B, scales), and the error after each; the best round is returned.

    A kernel without features keeps its term.
    """
    if not isinstance(term.kernel, FactoredKernel) or term.kernel.features(term.mu[:0].detach()) is None:
        return term, []
    found = Coordinates(term, objective, generator)
    best, errors = term, [found.error()]
    for _ in range(rounds):
        found.improve_a()
        found.improve_b()
        found.fit_scales()
        error = found.error()
        if error < min(errors):
            best = found.result()
        errors.append(error)
    return best, errors[1:]
