"""A hybrid: a linear term and a term of another kernel, fitted together."""

from collections.abc import Sequence

import torch

from nla.kernels.base import Kernel
from nla.kernels.linear import Linear
from nla.machine.errors import UserError
from nla.matrix.objective import Norms, Objective
from nla.matrix.triplets import triplet_size
from nla.methods.base import MatrixMethod, Shape
from nla.methods.fallback import no_worse, require_fallback
from nla.solvers.base import Solution, Start
from nla.solvers.gradient import GradientFit
from nla.storage.base import Coded, Storage
from nla.terms.base import Sum, Term
from nla.terms.kernel_term import KernelTerm
from nla.terms.triplet_terms import size, triplet_terms


class Hybrid(MatrixMethod):
    """W' = linear term + kernel term, fitted in the norm of the layer's outputs.

    With `solver.start=warm`, the linear term starts from SVD-LLM's solution of its rank, and the kernel term from what that
    leaves (with `storage=scaled`, some kernels are first fitted to it). Gradient descent then changes both together.

    Args:
        storage: how the numbers of the kernel term are kept.
        linear_share: fraction of the parameters that the linear term gets.
        sequential: each layer is fitted to inputs that passed through the compressed earlier layers.
        fallback: as in `nla.methods.nla.NLA`.

    Raises:
        UserError: linear_share is not between 0 and 1, or the storage has few bits or does not suit the kernel.
    """

    needs = frozenset({"gram"})

    def __init__(
        self,
        kernel: Kernel,
        solver: GradientFit,
        storage: Storage,
        linear_share: float,
        sequential: bool,
        fallback: str | None,
    ) -> None:
        if not isinstance(linear_share, int | float) or not 0 < linear_share < 1:
            raise UserError(f"method.linear_share={linear_share} must be a fraction, above 0 and below 1")
        if isinstance(storage, Coded):
            raise UserError("method=hybrid stores no codes of a few bits; use storage=scaled or storage=float")
        require_fallback(fallback)
        storage.check(kernel)
        self.sequential, self.fallback = sequential, fallback
        self.linear, self.kernel, self.storage = Linear(), kernel, storage
        self.solver, self.linear_share = solver, linear_share

    def objective(self, norms: Norms) -> Objective:
        return norms.outputs

    def plan_matrix(self, out_features: int, in_features: int, bits: int, dtype: torch.dtype) -> Sum:
        one = triplet_size(out_features, in_features, 1) * 8 * dtype.itemsize
        spare = bits - self.storage.least_bits(out_features, in_features, dtype)  # after one triplet of the kernel
        h = max(int(min(self.linear_share * bits, spare)) // one, 1) if spare >= one else 0  # a hybrid has both terms or none
        linear = KernelTerm.empty(self.linear, out_features, in_features, h, 1, dtype)
        left = bits - h * one if h else 0
        return Sum([linear, self.storage.plan(self.kernel, out_features, in_features, left, dtype)])

    def least_bits(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        linear = sum(triplet_size(m, n, 1) for m, n in shapes) * 8 * dtype.itemsize
        return linear + sum(self.storage.least_bits(m, n, dtype) for m, n in shapes)

    def start(self, objective: Objective, planned: Term, generator: torch.Generator) -> Start:
        assert isinstance(planned, Sum)
        linear, other = planned.summands
        assert isinstance(linear, KernelTerm)
        first = self.solver.begin(self.linear, objective, linear.h, linear.r, generator).term
        rest = objective.weight - first.dense().detach()
        scale = float(rest.square().mean().sqrt()) or 1.0
        remaining = Objective(rest / scale, objective.factor)
        second = self.storage.start(self.kernel, self.solver, remaining, other, generator).term
        return Start(Sum([first, second.scaled(scale)]))

    def find(self, objective: Objective, planned: Term, generator: torch.Generator) -> Solution:
        solution = self.storage.fit(self.solver, self.start(objective, planned, generator), objective)
        return no_worse(self.fallback, solution, planned, objective)

    def start_flops(self, term: Term) -> int:
        return sum(self.storage.start_flops(leaf.kernel, self.solver, *size(leaf)) for leaf in triplet_terms(term))

    def step_flops(self, term: Term) -> int:
        leaves = triplet_terms(term)
        return sum(leaf.kernel.fit_flops(*size(leaf)) + leaf.kernel.weighting_flops(*size(leaf)) for leaf in leaves)

    @property
    def steps(self) -> int:
        return self.solver.steps
