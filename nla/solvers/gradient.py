"""Triplets by gradient descent on the mean squared error, the paper's fit, with starts that make it short."""

import math
from collections.abc import Callable
from contextlib import ExitStack

import torch
from torch import Tensor

from nla.kernels.base import Kernel, Start, random_like
from nla.machine.errors import NonFiniteError, require_at_least_zero, require_choice, require_integer, require_positive
from nla.matrix.objective import Objective
from nla.solvers.base import Solution, Status

PRODUCTS = {"float32": torch.float32, "bfloat16": torch.bfloat16}
AT_OPTIMUM = 1e-4  # relative distance to a known optimum that counts as reached


class GradientFit:
    """Minimise ||(dense(A, B, mu) - W) S||^2 / ||W S||^2.

    Args:
        optimiser: parameter groups -> torch optimiser.
        start: `warm` (from singular vectors, see each kernel's warm_start) or `random` (the paper's).
        steps: at most this many.
        lr: step size relative to the root mean square of each of A, B and mu at the start.
        warmup: steps over which the step size rises linearly.
        schedule: `cosine` (falls to zero at `steps`) or `constant`.
        tolerance: a fit is converged once the error fell by less than this fraction within `patience` steps.
        interval: steps between two logged losses.
        products: type of the large matrix products; A, B, mu and the optimiser stay in fp32.
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

    def fit(
        self,
        kernel: Kernel,
        objective: Objective,
        h: int,
        r: int,
        generator: torch.Generator,
        measured: ExitStack,
    ) -> Solution:
        """Triplets that make the objective small.

        `measured` is closed once memory cannot rise any more: measuring it is not free.

        Raises:
            NonFiniteError: the loss left the finite numbers (a smaller solver.lr helps).
        """
        if self.start == "random":
            start = Start(random_like(kernel, objective.weight, h, r, generator))
        else:
            start = kernel.warm_start(objective, h, r, generator)
        return self.descend(kernel, objective, start, measured)

    def descend(self, kernel: Kernel, objective: Objective, start: Start, measured: ExitStack) -> Solution:
        """The loop: the best iterate is returned, so that no fit is worse than its start."""
        t = start.triplets.map(lambda p: p.clone().contiguous())
        energy = objective.energy
        sizes = [max(float(p.square().mean().sqrt()), 1e-12) for p in (t.A, t.B, t.mu)]
        groups = [{"params": [p], "lr": self.lr * size} for p, size in zip((t.A, t.B, t.mu), sizes, strict=True)]
        optimiser = self.optimiser(groups)
        best, best_error, reference = t, math.inf, math.inf
        losses: list[tuple[int, float]] = []
        for step in range(self.steps + 1):
            if step == 2:  # the optimiser's state is there, and every step is like the one before
                measured.close()
            loss, gradient = kernel.squared_error(t, objective, self.products)
            error = float(loss) / energy
            if not math.isfinite(error):
                raise NonFiniteError(f"the loss is {error} at step {step}; try solver.lr={self.lr / 3:.2g}")
            if error < best_error:
                best, best_error = t.map(Tensor.clone), error
            if step % self.interval == 0 or step == self.steps:
                losses.append((step, error))
            if start.optimum is not None and best_error <= start.optimum * (1 + AT_OPTIMUM) + 1e-9:
                return Solution(best, losses, step, Status.OPTIMAL, start.optimum)
            if step % self.patience == 0 and step > self.warmup:
                if best_error > reference * (1 - self.tolerance):
                    return Solution(best, losses, step, Status.CONVERGED, start.optimum)
                reference = best_error
            if step < self.steps:
                for group, size in zip(optimiser.param_groups, sizes, strict=True):
                    group["lr"] = self.lr * size * self.rate(step)
                for p, g in zip((t.A, t.B, t.mu), (gradient.A, gradient.B, gradient.mu), strict=True):
                    p.grad = g.div_(energy)
                optimiser.step()
        return Solution(best, losses, self.steps, Status.STEP_LIMIT, start.optimum)

    def rate(self, step: int) -> float:
        """The fraction of lr that this step takes."""
        rising = min(1.0, (step + 1) / (self.warmup + 1))
        falling = 0.5 * (1 + math.cos(math.pi * step / self.steps)) if self.schedule == "cosine" else 1.0
        return rising * falling
