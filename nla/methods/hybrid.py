"""A hybrid: a linear term and a term of another kernel, fitted together."""

from collections.abc import Sequence
from contextlib import ExitStack

import torch

from nla.kernels.base import Kernel
from nla.kernels.linear import Linear
from nla.machine.errors import UserError
from nla.matrix.objective import Norms, Objective
from nla.matrix.triplets import triplet_size
from nla.methods.base import MatrixMethod, Shape
from nla.methods.kernel_method import size
from nla.solvers.base import Solution, Start
from nla.solvers.gradient import GradientFit
from nla.terms.base import Sum, Term
from nla.terms.kernel_term import KernelTerm


class Hybrid(MatrixMethod):
    """W' = linear term + kernel term, fitted in the norm of the layer's outputs.

    The linear term starts from SVD-LLM's solution of its rank. The kernel term starts from a fit of the remainder of the
    weight. Gradient descent then changes both together.

    Args:
        linear_share: fraction of the parameters that the linear term gets.
        sequential: each block is fitted to inputs that passed through the compressed earlier blocks.

    Raises:
        UserError: linear_share is not between 0 and 1.
    """

    needs = frozenset({"gram"})

    def __init__(self, kernel: Kernel, solver: GradientFit, linear_share: float, sequential: bool) -> None:
        if not isinstance(linear_share, int | float) or not 0 < linear_share < 1:
            raise UserError(f"method.linear_share={linear_share} must be a fraction, above 0 and below 1")
        self.sequential = sequential
        self.linear, self.kernel, self.solver, self.linear_share = Linear(), kernel, solver, linear_share

    def objective(self, norms: Norms) -> Objective:
        return norms.outputs

    def plan_matrix(self, out_features: int, in_features: int, bits: int, dtype: torch.dtype) -> Sum:
        numbers = bits // (8 * dtype.itemsize)
        one = triplet_size(out_features, in_features, 1)
        linear = min(max(int(self.linear_share * numbers), one), numbers - one)  # at least one triplet each, if two fit
        shares = ((self.linear, linear), (self.kernel, numbers - linear // one * one))
        return Sum(
            KernelTerm.empty(kernel, out_features, in_features, *kernel.size(out_features, in_features, max(n, 0)), dtype)
            for kernel, n in shares
        )

    def least_bits(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        return sum(2 * triplet_size(m, n, 1) for m, n in shapes) * 8 * dtype.itemsize

    def start(self, objective: Objective, planned: Term, generator: torch.Generator) -> Start:
        linear, other = (leaf for leaf in planned.leaves() if isinstance(leaf, KernelTerm))
        first = self.solver.begin(self.linear, objective, linear.h, linear.r, generator).term
        rest = objective.weight - first.dense().detach()
        scale = float(rest.square().mean().sqrt()) or 1.0
        remaining = Objective(rest / scale, objective.factor)
        second = self.solver.begin(self.kernel, remaining, other.h, other.r, generator).term
        return Start(Sum([first, second.scaled(scale)]))

    def find(self, objective: Objective, planned: Term, generator: torch.Generator, memory: ExitStack) -> Solution:
        return self.solver.descend(self.start(objective, planned, generator), objective, memory)

    def start_flops(self, term: Term) -> int:
        return sum(leaf.kernel.warm_start_flops(*size(leaf)) for leaf in term.leaves() if isinstance(leaf, KernelTerm))

    def step_flops(self, term: Term) -> int:
        leaves = [leaf for leaf in term.leaves() if isinstance(leaf, KernelTerm)]
        return sum(leaf.kernel.fit_flops(*size(leaf)) + leaf.kernel.weighting_flops(*size(leaf)) for leaf in leaves)

    @property
    def steps(self) -> int:
        return self.solver.steps
