"""The paper's budget: more triplets than may be kept at first, and the least important masked as retraining goes on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nla.budget.base import Budget
from nla.budget.importance import Importance, best
from nla.budget.schedule import Schedule
from nla.errors import UserError, require_choice
from nla.retrain.settings import Retraining
from nla.select import LinearSpec
from nla.triplets import Triplets, triplet_size


class Adaptive(Budget):
    """Every matrix begins with b0 times its uniform share; the whole model ends within the ratio.

    Args:
        schedule: b(t).
        beta1, beta2: smoothing of sensitivity and of uncertainty.
        rank: triplets are compared by `score`, or by `score_per_parameter`: those of larger matrices cost more of the budget.
    """

    tightens = True

    def __init__(self, schedule: Schedule, beta1: float, beta2: float, rank: str) -> None:
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if not isinstance(beta, int | float) or not 0 <= beta < 1:
                raise UserError(f"budget.{name}={beta} must be from 0 and below 1")
        require_choice("budget.rank", rank, ["score", "score_per_parameter"])
        self.schedule, self.beta1, self.beta2, self.rank = schedule, beta1, beta2, rank

    def allocate(self, specs: list[LinearSpec], ratio: float) -> dict[str, int]:
        """b0 times the uniform share, but never more than the dense matrix has."""
        kept = min(1.0, self.schedule.b0 * (1 - ratio))
        return {s.name: int(kept * s.n_params) for s in specs}

    def check_retraining(self, retraining: Retraining) -> None:
        if retraining.steps == 0:
            raise UserError(
                "budget=adaptive shares parameters out while retraining; "
                "set retrain.steps, or use budget=uniform or sensitivity"
            )
        if len(retraining.train) > 1 or not {"triplets", "everything"} & set(retraining.train[0]):
            raise UserError(
                f"budget=adaptive needs A, B and mu trained together; retrain.train={['+'.join(s) for s in retraining.train]} "
                "does not, retrain.train=[triplets+norms] does"
            )
        self.schedule.phases(retraining.steps)

    def tightening(self, triplets: Sequence[Triplets], final: int, steps: int) -> "Tightening":
        return Tightening(self, triplets, final, steps)


class Tightening:
    """The masks of one retraining. A masked triplet has mu = 0; the mu it had waits, and comes back with it.

    Its own dL/dmu goes on being known, so that it may become important again before the cool-down.

    Args:
        triplets: what is trained, one container per term, masked in place.
        final: b_f, parameters.
    """

    def __init__(self, budget: Adaptive, triplets: Sequence[Triplets], final: int, steps: int) -> None:
        self.schedule, self.rank, self.final, self.steps = budget.schedule, budget.rank, final, steps
        self.triplets = list(triplets)
        self.importance = Importance(self.triplets, budget.beta1, budget.beta2)
        self.masks = [torch.ones_like(t.mu, dtype=torch.bool) for t in self.triplets]
        self.waiting = [t.mu.detach().clone() for t in self.triplets]  # mu of masked triplets
        sizes = [triplet_size(t.out_features, t.in_features, t.r) for t in self.triplets]
        self.costs = torch.cat([torch.full((t.h,), size) for t, size in zip(self.triplets, sizes, strict=True)])
        self.start = int(self.costs.sum())

    def budget(self, done: int) -> int:
        """The budget in force after `done` steps."""
        return self.schedule.in_force(done, self.steps, self.start, self.final)

    @torch.no_grad()
    def after_gradient(self, done: int, gradients: Sequence[Triplets]) -> None:
        """Learn from the gradient of the step after `done`, at the values it was taken at."""
        if done < self.schedule.phases(self.steps)[1]:
            mus = self.whole()
            values = [Triplets(t.A, t.B, mu) for t, mu in zip(self.triplets, mus, strict=True)]
            self.importance.update(values, gradients)

    @torch.no_grad()
    def after_step(self, done: int) -> bool:
        """Mask what the optimiser moved, and choose anew where it is time to; whether it was."""
        mus = self.whole()
        chosen = self.schedule.chooses(done, self.steps)
        if chosen:
            keep = best(self.ranking(), self.costs, self.budget(done)).split([t.h for t in self.triplets])
            self.masks = [part.to(t.mu.device) for part, t in zip(keep, self.triplets, strict=True)]
        self.waiting = mus
        for t, mask, mu in zip(self.triplets, self.masks, mus, strict=True):
            t.mu.copy_(torch.where(mask, mu, 0))
        return chosen

    def whole(self) -> list[Tensor]:
        """mu of all triplets, masked or not."""
        parts = zip(self.masks, self.triplets, self.waiting, strict=True)
        return [torch.where(mask, t.mu, waiting) for mask, t, waiting in parts]

    def ranking(self) -> Tensor:
        """What triplets of the whole model are compared by: (count,), on the CPU."""
        scores = torch.cat([s.cpu() for s in self.importance.scores()])
        return scores / self.costs if self.rank == "score_per_parameter" else scores

    def kept(self) -> list[int]:
        """Parameters of each term that are not masked."""
        sizes = [triplet_size(t.out_features, t.in_features, t.r) for t in self.triplets]
        return [int(mask.sum()) * size for mask, size in zip(self.masks, sizes, strict=True)]

    def tensors(self) -> dict[str, Tensor]:
        """All that the next steps depend on."""
        named: dict[str, Tensor] = {}
        for i, (mask, waiting) in enumerate(zip(self.masks, self.waiting, strict=True)):
            named |= {f"{i}.mask": mask, f"{i}.waiting": waiting}
            for name, t in (("smoothed", self.importance.smoothed[i]), ("uncertainty", self.importance.uncertainty[i])):
                named |= {f"{i}.{name}.A": t.A, f"{i}.{name}.B": t.B, f"{i}.{name}.mu": t.mu}
        return named

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, target in self.tensors().items():
            target.copy_(tensors[name])
