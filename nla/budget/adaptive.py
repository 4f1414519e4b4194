"""The paper's budget: more triplets than may be kept at first, and the least important masked as retraining goes on."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nla.budget.base import Budget, Target
from nla.budget.importance import Importance, best
from nla.budget.schedule import Schedule
from nla.machine.errors import UserError, require_choice
from nla.matrix.triplets import Triplets, triplet_size
from nla.models.select import LinearSpec
from nla.training.processes import OneProcess


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

    def allocate(self, specs: list[LinearSpec], target: Target) -> dict[str, int]:
        """b0 times the uniform share, but never more than the dense matrix has."""
        bits = min(target.width, self.schedule.b0 * target.bits)
        return {s.name: int(bits * s.n_params) for s in specs}

    def check_retraining(self, steps: int, train: list[list[str]]) -> None:
        if steps == 0:
            raise UserError(
                "budget=adaptive shares parameters out while retraining; "
                "set retrain.steps, or use budget=uniform or sensitivity"
            )
        parts = set(train[0])
        if len(train) > 1 or not ({"triplets", "everything"} & parts or {"A", "B", "mu"} <= parts):
            raise UserError(
                f"budget=adaptive needs A, B and mu trained together; retrain.train={['+'.join(s) for s in train]} "
                "does not, retrain.train=[triplets+norms] does"
            )
        self.schedule.phases(steps)

    def tightening(
        self,
        triplets: Sequence[Triplets],
        final: int,
        steps: int,
        processes: OneProcess | None = None,
        owners: Sequence[int] | None = None,
    ) -> "Tightening":
        return Tightening(self, triplets, final, steps, processes or OneProcess(), owners or [0] * len(triplets))


class Tightening:
    """The masks of one retraining. A masked triplet has mu = 0; the mu it had waits, and comes back with it.

    Its own dL/dmu goes on being known, so that it may become important again before the cool-down.

    Args:
        triplets: what is trained, one container per term, masked in place.
        final: b_f, parameters.
        owners: the process that follows the importance of each term, and moves its numbers; masks are known to all.
    """

    def __init__(
        self,
        budget: Adaptive,
        triplets: Sequence[Triplets],
        final: int,
        steps: int,
        processes: OneProcess,
        owners: Sequence[int],
    ) -> None:
        self.schedule, self.rank, self.final, self.steps, self.processes = budget.schedule, budget.rank, final, steps, processes
        self.triplets = list(triplets)
        self.own = [i for i, owner in enumerate(owners) if owner == processes.rank]
        self.importance = Importance([self.triplets[i] for i in self.own], budget.beta1, budget.beta2)
        self.masks = [torch.ones_like(t.mu, dtype=torch.bool) for t in self.triplets]
        self.waiting = {i: self.triplets[i].mu.detach().clone() for i in self.own}  # mu of masked triplets
        self.sizes = [triplet_size(t.out_features, t.in_features, t.r) for t in self.triplets]
        self.costs = torch.cat([torch.full((t.h,), size) for t, size in zip(self.triplets, self.sizes, strict=True)])
        self.start = int(self.costs.sum())

    @property
    def cool_down(self) -> int:
        """The step after which no mask changes any more."""
        return self.schedule.phases(self.steps)[1]

    def budget(self, done: int) -> int:
        """The budget in force after `done` steps."""
        return self.schedule.in_force(done, self.steps, self.start, self.final)

    @torch.no_grad()
    def after_gradient(self, done: int, gradients: Sequence[Triplets]) -> None:
        """Learn from the gradient (of the own terms) of the step after `done`, at the values it was taken at."""
        if done < self.cool_down:
            mus = self.whole()
            values = [Triplets(self.triplets[i].A, self.triplets[i].B, mus[i]) for i in self.own]
            self.importance.update(values, gradients)

    @torch.no_grad()
    def after_step(self, done: int) -> Tensor | None:
        """Mask what the optimiser moved; where it is time to choose anew, what triplets were ranked by: (count,)"""
        mus, ranking = self.whole(), None
        if self.schedule.chooses(done, self.steps):
            ranking = self.ranking()
            keep = best(ranking, self.costs, self.budget(done)).split([t.h for t in self.triplets])
            self.masks = [part.to(t.mu.device) for part, t in zip(keep, self.triplets, strict=True)]
        self.waiting = mus
        for i, mu in mus.items():
            self.triplets[i].mu.copy_(torch.where(self.masks[i], mu, 0))
        return ranking

    def whole(self) -> dict[int, Tensor]:
        """mu of all own triplets, masked or not."""
        return {i: torch.where(self.masks[i], self.triplets[i].mu, self.waiting[i]) for i in self.own}

    def ranking(self) -> Tensor:
        """What triplets of the whole model are compared by: (count,), on the CPU."""
        device = self.triplets[0].mu.device  # parts of the model may be on others
        scores = [torch.zeros(t.h, device=device) for t in self.triplets]
        for i, found in zip(self.own, self.importance.scores(), strict=True):
            scores[i] = found.to(device)
        together = torch.cat(scores)
        self.processes.sum(together)  # each has the others' as zeros
        return together.cpu() / self.costs if self.rank == "score_per_parameter" else together.cpu()

    def kept(self) -> list[int]:
        """Parameters of each term that are not masked."""
        return [int(mask.sum()) * size for mask, size in zip(self.masks, self.sizes, strict=True)]

    def tensors(self) -> dict[str, Tensor]:
        """All that the next steps depend on."""
        named = {f"{i}.mask": mask for i, mask in enumerate(self.masks)}
        for i, smoothed, uncertainty in zip(self.own, self.importance.smoothed, self.importance.uncertainty, strict=True):
            named[f"{i}.waiting"] = self.waiting[i]
            for name, t in (("smoothed", smoothed), ("uncertainty", uncertainty)):
                named |= {f"{i}.{name}.A": t.A, f"{i}.{name}.B": t.B, f"{i}.{name}.mu": t.mu}
        return named

    def restore(self, tensors: dict[str, Tensor]) -> None:
        for name, target in self.tensors().items():
            target.copy_(tensors[name])
