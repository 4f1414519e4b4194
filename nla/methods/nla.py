"""The paper's method: triplets of a kernel, fitted by a solver."""

from contextlib import ExitStack

import torch

from nla.kernels.base import Kernel
from nla.kernels.linear import Linear
from nla.machine.errors import UserError, require_choice
from nla.matrix.objective import Norms, Objective
from nla.matrix.triplets import triplet_size
from nla.methods.fit import squared_error_of
from nla.methods.kernel_method import KernelMethod, size
from nla.solvers.base import Solution, Start, Status
from nla.solvers.gradient import GradientFit
from nla.terms.base import Term
from nla.terms.kernel_term import KernelTerm


class NLA(KernelMethod):
    """Nonlinear low-rank approximation (NLA) with any kernel.

    Args:
        loss: `weight` (the paper's, ||W' - W||^2) or `activation` (||(W' - W) X^T||^2 over the calibration tokens X).
        sequential: X are inputs that passed through the compressed earlier blocks.
        fallback: `linear`: a matrix whose fit has a larger error than linear factors with as many parameters gets those. None:
            it keeps the fit.

    Raises:
        UserError: a value is not known, or `sequential` is set although the loss has no inputs.
    """

    def __init__(self, kernel: Kernel, solver: GradientFit, loss: str, sequential: bool, fallback: str | None) -> None:
        require_choice("method.loss", loss, ["weight", "activation"])
        if sequential and loss == "weight":
            raise UserError("method.sequential=true is about the layers' inputs; add method.loss=activation")
        require_choice("method.fallback", fallback, [None, "linear"])
        self.kernel, self.solver, self.sequential, self.fallback = kernel, solver, sequential, fallback
        self.needs = frozenset({"gram"} if loss == "activation" else ())

    def objective(self, norms: Norms) -> Objective:
        return norms.outputs if self.needs else norms.plain

    def start(self, objective: Objective, planned: Term, generator: torch.Generator) -> Start:
        assert isinstance(planned, KernelTerm)
        return self.solver.begin(self.kernel, objective, planned.triplets.h, planned.triplets.r, generator)

    def find(self, objective: Objective, planned: Term, generator: torch.Generator, memory: ExitStack) -> Solution:
        solution = self.solver.descend(self.start(objective, planned, generator), objective, memory)
        return solution if self.fallback is None else no_worse_than_linear(solution, objective)

    def start_flops(self, term: Term) -> int:
        assert isinstance(term, KernelTerm)
        return self.kernel.warm_start_flops(*size(term)) if self.solver.start == "warm" else 0

    def step_flops(self, term: Term) -> int:
        assert isinstance(term, KernelTerm)
        weighting = self.kernel.weighting_flops(*size(term)) if self.needs else 0
        return self.kernel.fit_flops(*size(term)) + weighting

    @property
    def steps(self) -> int:
        return self.solver.steps


def no_worse_than_linear(solution: Solution, objective: Objective) -> Solution:
    """The solution, or the best linear factors with as many parameters if their error is smaller."""
    term = solution.term
    rank = term.count() // triplet_size(term.out_features, term.in_features, 1)
    if not objective.spectrum.tail(rank) < float(squared_error_of(term, objective)) / objective.energy:
        return solution
    triplets, optimum = Linear().warm_start(objective, rank, 1, torch.Generator())
    losses = [*solution.losses, (solution.steps, objective.spectrum.tail(rank))]
    return Solution(KernelTerm(Linear(), triplets), losses, solution.steps, Status.LINEAR, optimum)
