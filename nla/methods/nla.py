"""The paper's method: triplets of a kernel, fitted by a solver."""

from collections.abc import Sequence

import torch

from nla.kernels.base import Kernel
from nla.machine.errors import UserError, require_choice
from nla.matrix.objective import Norms, Objective
from nla.methods.base import MatrixMethod, Shape, require_correction
from nla.methods.fallback import no_worse, require_fallback
from nla.solvers.base import Solution, Start
from nla.solvers.gradient import GradientFit
from nla.storage.base import Storage
from nla.terms.base import Term
from nla.terms.triplet_terms import size


class NLA(MatrixMethod):
    """Nonlinear low-rank approximation (NLA) with any kernel.

    Args:
        storage: how the numbers of the triplets are kept; the fit knows it.
        loss: `weight` (the paper's, ||W' - W||^2) or `activation` (||(W' - W) X^T||^2 over the calibration tokens X).
        sequential: X are inputs that passed through the compressed earlier layers.
        correction: fraction of the errors of these blocks that is corrected, see `Norms.outputs`.
        fallback: `linear`: a matrix whose fit has a larger error than linear factors with as many bits gets those. None: it
            is not compared.

    Raises:
        UserError: a value is not known, `sequential` is set although the loss has no inputs, or the kernel's triplets cannot be
            stored so.
    """

    def __init__(
        self,
        kernel: Kernel,
        solver: GradientFit,
        storage: Storage,
        loss: str,
        sequential: bool,
        correction: float,
        fallback: str | None,
    ) -> None:
        require_choice("method.loss", loss, ["weight", "activation"])
        if sequential and loss == "weight":
            raise UserError("method.sequential=true is about the layers' inputs; add method.loss=activation")
        require_correction(correction, sequential)
        require_fallback(fallback)
        storage.check(kernel)
        self.kernel, self.solver, self.storage = kernel, solver, storage
        self.sequential, self.correction, self.fallback = sequential, correction, fallback
        self.needs = frozenset({"gram"} if loss == "activation" else ())

    def objective(self, norms: Norms) -> Objective:
        return norms.outputs if self.needs else norms.plain

    def plan_matrix(self, out_features: int, in_features: int, bits: int, dtype: torch.dtype) -> Term:
        return self.storage.plan(self.kernel, out_features, in_features, bits, dtype)

    def least_bits(self, shapes: Sequence[Shape], dtype: torch.dtype) -> int:
        return sum(self.storage.least_bits(m, n, dtype) for m, n in shapes)

    def start(self, objective: Objective, planned: Term, generator: torch.Generator) -> Start:
        return self.storage.start(self.kernel, self.solver, objective, planned, generator)

    def find(self, objective: Objective, planned: Term, generator: torch.Generator) -> Solution:
        start = self.start(objective, planned, generator)
        solution = self.storage.fit(self.solver, start, objective)
        return no_worse(self.fallback, solution, planned, objective)

    def start_flops(self, term: Term) -> int:
        return self.storage.start_flops(self.kernel, self.solver, *size(term))

    def step_flops(self, term: Term) -> int:
        weighting = self.kernel.weighting_flops(*size(term)) if self.needs else 0
        return self.kernel.fit_flops(*size(term)) + weighting

    @property
    def steps(self) -> int:
        return self.solver.steps
