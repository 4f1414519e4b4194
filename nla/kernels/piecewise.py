"""The paper's kernel: weighted squared distances between factor rows, with a forward pass of three terms."""

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from nla.kernels.base import Constraint
from nla.kernels.factored import FactoredKernel
from nla.kernels.precision import without_autocast
from nla.kernels.self_term_surface import SelfTermSurface, self_term
from nla.kernels.self_terms import fit_self_terms, fit_self_terms_flops
from nla.matrix.objective import Objective
from nla.matrix.spectrum import spectrum_flops
from nla.matrix.triplets import Triplets, column_sizes


class Piecewise(FactoredKernel):
    """W'[i, j] = sum_l mu_l ||A_il - B_jl||^2  (NLA, eq. 3).

    Expanded, the matrix is s_out 1^T + 1 s_in^T - 2 sum_l mu_l A_l B_l^T, of rank h*r + 2 at most. Its self-terms are
    s_out[i] = sum_l mu_l ||A_il||^2 and s_in[j] = sum_l mu_l ||B_jl||^2.
    """

    def entry(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).square().sum(-1)

    def factors(self, t: Triplets) -> tuple[Tensor, Tensor]:
        s_out, s_in = self_term(t.A, t.mu), self_term(t.B, t.mu)
        left = torch.cat((s_out[:, None], torch.ones_like(s_out)[:, None], (t.A * (-2 * t.mu[:, None])).flatten(1)), 1)
        right = torch.cat((torch.ones_like(s_in)[:, None], s_in[:, None], t.B.flatten(1)), 1)
        return left, right

    def factors_to_round(self, t: Triplets) -> tuple[Tensor, Tensor]:
        """Factors (out, h*r + 2) and (in, h*r + 2) with self-terms of the matrix's own size.

        The two self-terms nearly cancel each other and the inner products. Here they are what is left after that: the
        columns of the inner products have mean zero, so s_out is the mean of each row of the matrix, and s_in that of each
        column, without the mean of all entries.
        """
        left, right = self.factors(t)
        s_out, s_in, a, b = left[:, 0], right[:, 1], left[:, 2:], right[:, 2:]
        mean_a, mean_b = a.mean(0), b.mean(0)
        a, b = a - mean_a, b - mean_b  # M = a b^T + (a mean_b) 1^T + 1 (b mean_a)^T + (mean_a . mean_b)
        s_out, s_in = s_out + a @ mean_b + mean_a @ mean_b, s_in + b @ mean_a
        s_out, s_in = s_out + s_in.mean(), s_in - s_in.mean()
        left = torch.cat((s_out[:, None], left[:, 1:2], a), 1)
        return left, torch.cat((right[:, :1], s_in[:, None], b), 1)

    def apply(self, t: Triplets, x: Tensor) -> Tensor:
        return without_autocast(ThreeTerms.apply, t, x)

    def balanced(self, t: Triplets) -> Triplets:
        """Triplets with mu = +1, -1 or 0: c A_l, c B_l and mu_l / c^2 give the same matrix as A_l, B_l and mu_l."""
        scale = torch.where(t.mu != 0, t.mu.abs().sqrt(), 1.0)[:, None]
        return Triplets(t.A * scale, t.B * scale, t.mu.sign())

    def with_size(self, t: Triplets, size: float) -> Triplets:
        scale = column_sizes(torch.cat((t.A, t.B))) / size
        return Triplets(t.A / scale[:, None], t.B / scale[:, None], t.mu * scale.square())

    def constraint(self, t: Triplets, trained: frozenset[str]) -> Constraint | None:
        """The surface on which the self-terms keep their fitted values: see `nla.kernels.self_term_surface`."""
        return SelfTermSurface(t, trained)

    def columns(self, h: int, r: int) -> int:
        return h * r + 2

    def random_start(self, out_features: int, in_features: int, h: int, r: int, generator: torch.Generator) -> Triplets:
        A = torch.randn(out_features, h, r, generator=generator)
        B = torch.randn(in_features, h, r, generator=generator)
        mu = torch.randn(h, generator=generator) / (8 * h * r) ** 0.5  # each ||a - b||^2 has variance 8 r
        return Triplets(A, B, mu)

    def warm_start(self, objective: Objective, h: int, r: int, generator: torch.Generator) -> tuple[Triplets, float | None]:
        """The global optimum, or triplets near it: see `nla.kernels.self_terms`."""
        return fit_self_terms(objective, h, r)

    def warm_start_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        return spectrum_flops(out_features, in_features) + fit_self_terms_flops(out_features, in_features, h * r)


class ThreeTerms(torch.autograd.Function):
    """Y = (X 1) s_out^T + (X s_in) 1^T - 2 (X B) diag(mu) A^T  (NLA, algorithm 1), and its gradient.

    Both are written by hand to save memory: mu multiplies the (tokens, h*r) side, and the squares are added in place. Beside
    inputs, outputs and gradients, only (tokens, h*r) and (features, h) numbers are in memory.
    """

    @staticmethod
    def forward(ctx, x, A, B, mu):  # type: ignore[no-untyped-def]
        wide, r = widened(x.dtype), A.shape[2]
        tokens = x.reshape(-1, x.shape[-1])  # (..., in) -> (tokens, in)
        inner = tokens @ B.flatten(1)  # (tokens, h*r)
        y = ((inner * (-2 * mu).repeat_interleave(r)) @ A.flatten(1).T).to(wide)
        y.addr_(tokens.sum(-1, dtype=wide), squares(A, wide) @ mu.to(wide))
        y.add_((tokens.to(wide) @ (squares(B, wide) @ mu.to(wide)))[:, None])
        ctx.save_for_backward(x, A, B, mu, inner)
        return y.to(x.dtype).view(*x.shape[:-1], A.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, d_y):  # type: ignore[no-untyped-def]
        x, A, B, mu, inner = ctx.saved_tensors
        wide, r = widened(x.dtype), A.shape[2]
        tokens, d_y = x.reshape(-1, x.shape[-1]), d_y.reshape(-1, A.shape[0])
        scale, mu_wide = (-2 * mu).repeat_interleave(r), mu.to(wide)
        A2, B2 = squares(A, wide), squares(B, wide)
        row, column = tokens.sum(-1, dtype=wide), d_y.sum(-1, dtype=wide)  # (tokens,)
        d_s_out, d_s_in = row @ d_y.to(wide), column @ tokens.to(wide)  # (out,), (in,)
        d_scaled = d_y @ A.flatten(1)  # (tokens, h*r)

        cross = (d_scaled * inner).sum(0, dtype=wide).unflatten(0, (-1, r)).sum(-1)  # (h,)
        d_mu = (d_s_out @ A2 + d_s_in @ B2 - 2 * cross).to(mu.dtype)
        d_A = (d_y.T @ (inner * scale)).view_as(A)
        d_A.addcmul_(A, (d_s_out[:, None] * mu_wide)[:, :, None].to(A.dtype), value=2)
        d_inner = d_scaled.mul_(scale)
        d_B = (tokens.T @ d_inner).view_as(B)
        d_B.addcmul_(B, (d_s_in[:, None] * mu_wide)[:, :, None].to(B.dtype), value=2)
        d_x = None
        if ctx.needs_input_grad[0]:
            d_x = (d_inner @ B.flatten(1).T).to(wide)
            d_x.addr_(column, B2 @ mu_wide).add_((d_y.to(wide) @ (A2 @ mu_wide))[:, None])
            d_x = d_x.to(x.dtype).view_as(x)
        return d_x, d_A, d_B, d_mu


def widened(dtype: torch.dtype) -> torch.dtype:
    """The type in which self-terms are summed: fp32 or wider, because they nearly cancel and bf16 is too coarse for that."""
    return torch.promote_types(dtype, torch.float32)


def squares(factor: Tensor, dtype: torch.dtype) -> Tensor:
    """||factor_il||^2 without a copy of the factor: (n, h, r) -> (n, h)"""
    return torch.linalg.vector_norm(factor, dim=-1, dtype=dtype).square_()
