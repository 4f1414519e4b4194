"""Fits triplets by gradient descent on the squared error, as the paper does. A warm start makes the fit short."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from nla.kernels.base import Kernel, random_like
from nla.machine.errors import NonFiniteError, require_at_least_zero, require_choice, require_integer, require_positive
from nla.matrix.objective import Objective
from nla.matrix.triplets import Triplets
from nla.solvers.base import Solution, Start, Status
from nla.solvers.squared_error import squared_error, squared_error_alone
from nla.terms.base import Sum, Term
from nla.terms.kernel_term import KernelTerm

PRODUCTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AT_OPTIMUM = 1e-4  # relative distance to a known optimum at which it counts as reached


class GradientFit:
    """Minimises ||(dense(A, B, mu) - W) S||^2 / ||W S||^2 by gradient descent.

    Args:
        optimiser: function from parameter groups to a torch optimiser.
        start: `warm` (from singular vectors, see each kernel's warm_start) or `random` (the paper's).
        steps: largest number of steps.
        lr: learning rate, relative to the root mean square of each of A, B and mu at the start.
        warmup: steps over which the learning rate rises linearly.
        schedule: `cosine` (falls to zero at `steps`) or `constant`.
        tolerance: a fit has converged once the error falls by less than this fraction within `patience` steps.
        interval: steps between two logged losses.
        products: type of the large matrix products; A, B, mu and the optimiser stay in fp32.

    Raises:
        UserError: a setting is not allowed.
    """

    def __init__(
        self,
        optimiser: Callable[[list[dict]], torch.optim.Optimizer],
        start: str,
        steps: int,
        lr: float,
        warmup: int,
        schedule: str,
        tolerance: float,
        patience: int,
        interval: int,
        products: str,
    ) -> None:
        require_choice("solver.start", start, ["warm", "random"])
        require_choice("solver.schedule", schedule, ["cosine", "constant"])
        require_choice("solver.products", products, list(PRODUCTS))
        require_positive("solver.lr", lr)
        for name, value, least in (
            ("steps", steps, 0),
            ("warmup", warmup, 0),
            ("interval", interval, 1),
            ("patience", patience, 1),
        ):
            require_integer(f"solver.{name}", value, least)
        require_at_least_zero("solver.tolerance", tolerance)
        self.optimiser, self.start, self.steps, self.lr = optimiser, start, steps, lr
        self.warmup, self.schedule, self.tolerance = warmup, schedule, tolerance
        self.patience, self.interval, self.products = patience, interval, PRODUCTS[products]

    def begin(self, kernel: Kernel, objective: Objective, h: int, r: int, generator: torch.Generator) -> Start:
        """The start of a fit of one kernel with h triplets of r columns: random or warm, as `start` says."""
        if self.start == "random":
            return Start(KernelTerm(kernel, random_like(kernel, objective.weight, h, r, generator)))
        triplets, optimum = kernel.warm_start(objective, h, r, generator)
        return Start(KernelTerm(kernel, triplets), optimum)

    def descend(self, start: Start, objective: Objective, measured: ExitStack) -> Solution:
        """The best iterate of a descent that changes the triplets of all terms together. It is never worse than the start.

        Args:
            measured: context that measures peak memory. It is closed once memory cannot rise any more, to save time.

        Raises:
            NonFiniteError: the loss is NaN or infinite (a smaller solver.lr helps).
        """
        terms = [term for term in start.term.leaves() if isinstance(term, KernelTerm)]
        kernels = [term.kernel for term in terms]
        moved = [term.triplets.map(lambda p: p.detach().clone().contiguous()) for term in terms]
        numbers = [p for t in moved for p in t.tensors]
        energy = objective.energy
        sizes = [max(float(p.square().mean().sqrt()), 1e-12) for p in numbers]
        groups = [{"params": [p], "lr": self.lr * size} for p, size in zip(numbers, sizes, strict=True)]
        optimiser = self.optimiser(groups)
        best, best_error, reference = moved, math.inf, math.inf
        losses: list[tuple[int, float]] = []

        def solution(steps: int, status: Status) -> Solution:
            return Solution(sum_of(kernels, best), losses, steps, status, start.optimum)

        def at_optimum(step: int) -> bool:
            """Whether the best iterate is at the known optimum. Errors of bf16 products would hide it: fp32 decides."""
            if start.optimum is None:
                return False
            error = best_error
            if self.products != torch.float32 and step % self.interval == 0:
                error = float(squared_error_alone(kernels, best, objective)) / energy
            return error <= start.optimum * (1 + AT_OPTIMUM) + 1e-9

        for step in range(self.steps + 1):
            if step == 2:  # the optimiser's state exists now, and later steps need no more memory
                measured.close()
            if step < self.steps:
                loss, gradients = squared_error(kernels, moved, objective, self.products)
            else:
                loss = squared_error_alone(kernels, moved, objective, self.products)
            error = float(loss) / energy
            if not math.isfinite(error):
                raise NonFiniteError(f"the loss is {error} at step {step}; try solver.lr={self.lr / 3:.2g}")
            if error < best_error:
                best, best_error = [t.map(Tensor.clone) for t in moved], error
            if step % self.interval == 0 or step == self.steps:
                losses.append((step, error))
            if at_optimum(step):
                return solution(step, Status.OPTIMAL)
            if step % self.patience == 0 and step > self.warmup:
                if best_error > reference * (1 - self.tolerance):
                    return solution(step, Status.CONVERGED)
                reference = best_error
            if step < self.steps:
                for group, size in zip(optimiser.param_groups, sizes, strict=True):
                    group["lr"] = self.lr * size * self.rate(step)
                for p, g in zip(numbers, (g for t in gradients for g in t.tensors), strict=True):
                    p.grad = g.div(energy).contiguous()
                optimiser.step()
        return solution(self.steps, Status.STEP_LIMIT)

    def rate(self, step: int) -> float:
        """The learning rate of a step as a fraction of lr."""
        rising = min(1.0, (step + 1) / (self.warmup + 1))
        falling = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.schedule == "cosine" else 1.0
        return rising * falling


def sum_of(kernels: Sequence[Kernel], triplets: Sequence[Triplets]) -> Term:
    """The KernelTerm of one kernel and its triplets, or the Sum of several."""
    terms = [KernelTerm(kernel, t) for kernel, t in zip(kernels, triplets, strict=True)]
    return terms[0] if len(terms) == 1 else Sum(terms)
