"""Gradient descent with a start, as the paper fits triplets. A warm start makes the fit short."""

import math
from collections.abc import Callable, Sequence
from copy import copy
from typing import NamedTuple

import torch
from torch import Tensor

from nla.kernels.base import Kernel, random_like
from nla.machine.device import PRODUCTS
from nla.machine.errors import (
    NonFiniteError,
    UserError,
    require_at_least_zero,
    require_choice,
    require_integer,
    require_positive,
)
from nla.machine.peak_memory import measured_once
from nla.matrix.objective import Objective
from nla.solvers.base import Start, Status
from nla.terms.kernel_term import KernelTerm

Evaluate = Callable[[bool], tuple[float, Sequence[Tensor]]]  # see GradientFit.descend
Ended = Callable[[int, float, Sequence[Tensor]], Status | None]


class Descent(NamedTuple):
    """The (step, loss) that were logged, the number of steps, and how they ended."""

    losses: list[tuple[int, float]]
    steps: int
    status: Status


class GradientFit:
    """The settings of a fit, its start, and the steps of gradient descent on any numbers.

    `nla.solvers.triplets` and `nla.solvers.factored` give it the loss, the squared error of a matrix.

    Args:
        optimiser: function from parameter groups to a torch optimiser.
        start: `warm` (from singular vectors, see each kernel's warm_start) or `random` (the paper's).
        steps: largest number of steps.
        lr: learning rate, relative to the root mean square of each tensor (A, B, mu) at the start.
        warmup: steps over which the learning rate rises linearly.
        schedule: `cosine` (falls to zero at `steps`) or `constant`.
        tolerance: a fit of triplets has converged once the error falls by less than this fraction within `patience` steps.
        interval: steps between two logged losses.
        products: type of the large matrix products; the numbers and the optimiser stay in fp32.

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
        try:
            optimiser([{"params": [torch.zeros(1)], "lr": lr}])
        except Exception as error:  # whatever torch says of its arguments
            raise UserError(f"solver.optimiser cannot be built: {error}") from error

    def begin(self, kernel: Kernel, objective: Objective, h: int, r: int, generator: torch.Generator) -> Start:
        """The start of a fit of one kernel with h triplets of r columns: random or warm, as `start` says."""
        if self.start == "random":
            return Start(KernelTerm(kernel, random_like(kernel, objective.weight, h, r, generator)))
        triplets, optimum = kernel.warm_start(objective, h, r, generator)
        return Start(KernelTerm(kernel, triplets), optimum)

    def descend(self, numbers: Sequence[Tensor], evaluate: Evaluate, ended: Ended, slower: float = 1.0) -> Descent:
        """Change the numbers in place until `ended` or the last step. They end as the best iterate, never worse than the start.

        Args:
            numbers: contiguous. A fused optimiser needs numbers and gradients of the same memory layout, and does not check.
            evaluate: whether gradients are needed -> the loss of the numbers as they are, and its gradients.
            ended: (step, smallest loss, numbers that have it) -> how the fit ended, or None if it goes on.
            slower: factor of the learning rate.

        Raises:
            NonFiniteError: the loss is NaN or infinite (a smaller solver.lr helps).
        """
        sizes = [max(float(p.detach().square().mean().sqrt()), 1e-12) for p in numbers]
        lr = self.lr * slower
        groups = [{"params": [p], "lr": lr * size} for p, size in zip(numbers, sizes, strict=True)]
        optimiser = self.optimiser(groups)
        best, smallest, losses, status = list(numbers), math.inf, list[tuple[int, float]](), None
        for step in range(self.steps + 1):
            with measured_once(max(0, step - 1)):  # from step 1 on, the optimiser's state exists
                loss, gradients = evaluate(step < self.steps)
                if not math.isfinite(loss):
                    raise NonFiniteError(f"the loss is {loss} at step {step}; try solver.lr={self.lr / 3:.2g}")
                if loss < smallest:
                    best, smallest = [p.detach().clone() for p in numbers], loss
                if step % self.interval == 0 or step == self.steps:
                    losses.append((step, loss))
                status = ended(step, smallest, best)
                if status or step == self.steps:
                    break
                for group, p, g, size in zip(optimiser.param_groups, numbers, gradients, sizes, strict=True):
                    group["lr"] = lr * size * self.rate(step)
                    p.grad = g.contiguous()
                optimiser.step()
        with torch.no_grad():
            for p, kept in zip(numbers, best, strict=True):
                p.copy_(kept)
        return Descent(losses, step, status or Status.STEP_LIMIT)

    def with_steps(self, steps: int) -> "GradientFit":
        """The same settings with another number of steps."""
        other = copy(self)
        other.steps = steps
        return other

    def rate(self, step: int) -> float:
        """The learning rate of a step as a fraction of lr."""
        rising = min(1.0, (step + 1) / (self.warmup + 1))
        falling = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.schedule == "cosine" else 1.0
        return rising * falling
