"""The linear kernel: a product of two factors, as in truncated SVD and in all SVD baselines."""

import torch
from torch import Tensor

from nla.kernels.factored import FactoredKernel
from nla.matrix.objective import Objective
from nla.matrix.spectrum import balanced_factors, mixed_factors, spectrum_flops
from nla.matrix.triplets import Triplets, column_sizes


class Linear(FactoredKernel):
    """W'[i, j] = sum_l mu_l <A_il, B_jl>. The rank is at most h*r."""

    def entry(self, a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(-1)

    def factors(self, t: Triplets) -> tuple[Tensor, Tensor]:
        return (t.A * t.mu[:, None]).flatten(1), t.B.flatten(1)

    def features(self, numbers: Tensor) -> tuple[Tensor, Tensor]:
        return numbers[:, None], numbers[:, None]

    def balanced(self, t: Triplets) -> Triplets:
        """Triplets with ||A_l|| = ||B_l|| and mu = +1, -1 or 0, so that steps on A and on B change the matrix equally."""
        a, b = (torch.linalg.vector_norm(f, dim=(0, 2)) for f in (t.A, t.B))
        size = (t.mu.abs() * a * b).sqrt()
        scale_a, scale_b = (torch.where(norm > 0, size / norm, 1.0)[:, None] for norm in (a, b))
        return Triplets(t.A * scale_a, t.B * scale_b, t.mu.sign())

    def with_size(self, t: Triplets, size: float) -> Triplets:
        a, b = (column_sizes(f) / size for f in (t.A, t.B))
        return Triplets(t.A / a[:, None], t.B / b[:, None], t.mu * a * b)

    def columns(self, h: int, r: int) -> int:
        return h * r

    def warm_start_flops(self, out_features: int, in_features: int, h: int, r: int) -> int:
        return spectrum_flops(out_features, in_features)

    def random_start(self, out_features: int, in_features: int, h: int, r: int, generator: torch.Generator) -> Triplets:
        scale = (h * r) ** -0.25
        A = scale * torch.randn(out_features, h, r, generator=generator)
        B = scale * torch.randn(in_features, h, r, generator=generator)
        return Triplets(A, B, torch.ones(h))

    def mixed_start(self, objective: Objective, h: int, r: int, generator: torch.Generator) -> Triplets:
        """The optimum as in `warm_start`, in a random basis, so that all triplets have the same share of it."""
        left, right = mixed_factors(objective.spectrum, h * r, generator)
        A, B = (f.unflatten(1, (h, r)).to(objective.weight.dtype) for f in (left, right))
        return Triplets(A, B, torch.ones_like(A[0, :, 0]))

    def warm_start(self, objective: Objective, h: int, r: int, generator: torch.Generator) -> tuple[Triplets, float | None]:
        """Truncated SVD in the objective's norm, which is the optimum (Eckart and Young, 1936), and its error."""
        left, right = balanced_factors(objective.spectrum, h * r)
        A = left.unflatten(1, (h, r)).to(objective.weight.dtype)
        B = right.unflatten(1, (h, r)).to(objective.weight.dtype)
        return Triplets(A, B, torch.ones_like(A[0, :, 0])), objective.spectrum.tail(h * r)
