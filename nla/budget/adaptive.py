"""The paper's adaptive budget: it starts with more triplets than fit the target, and masks the least important."""

from collections.abc import Sequence

import torch
from torch import Tensor

from nla.budget.base import Budget, Target
from nla.budget.importance import Importance, best
from nla.budget.schedule import Schedule
from nla.machine.errors import UserError, require_choice, require_fraction
from nla.matrix.triplets import Triplets, triplet_size
from nla.models.select import LinearSpec
from nla.training.processes import OneProcess


class Adaptive(Budget):
    """Every matrix begins with b0 times its uniform share. Retraining reduces the model to the target (NLA; AdaLoRA).

    A triplet is one summand mu_l k(A[:, l], B[:, l]) of a matrix. All triplets of the model compete for one total.

    Args:
        schedule: the budget b(t).
        beta1, beta2: smoothing of the sensitivity and of its uncertainty (see `nla.budget.importance.Importance`).
        rank: compare triplets by `score` (the papers') or by `score_per_parameter`. Triplets of larger matrices have more
            parameters.
        gradient: the dL/dw of the importance: `loss` for the loss's own (the papers'), or `constrained` for the part of it
            that the constraint of the kernel lets through (see `nla.kernels.base.Constraint`).

    Raises:
        UserError: an argument is out of range; it names the setting.
    """

    tightens = True

    def __init__(self, schedule: Schedule, beta1: float, beta2: float, rank: str, gradient: str) -> None:
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            require_fraction(f"budget.{name}", beta)
        require_choice("budget.rank", rank, ["score", "score_per_parameter"])
        require_choice("budget.gradient", gradient, ["loss", "constrained"])
        self.schedule, self.beta1, self.beta2, self.rank, self.gradient = schedule, beta1, beta2, rank, gradient

    def allocate(self, specs: list[LinearSpec], target: Target) -> dict[str, int]:
        """{matrix: bits at the start}: b0 times the uniform share, but less than the dense matrix."""
        bits = self.schedule.b0 * target.bits
        # below the dense matrix, which would be kept as it is and has no triplets
        return {s.name: min(int(bits * s.n_params), target.width * s.n_params - 1) for s in specs}

    def check_retraining(self, steps: int, train: list[list[str]]) -> None:
        if steps == 0:
            raise UserError(
                "budget=adaptive shares parameters out while retraining; "
                "set retrain.steps, or use another budget, such as uniform"
            )
        parts = set(train[0])
        if len(train) > 1 or not ({"triplets", "everything"} & parts or {"A", "B", "mu"} <= parts):
            raise UserError(
                f"budget=adaptive needs A, B and mu trained together; retrain.train={['+'.join(s) for s in train]} "
                "does not, retrain.train=[triplets+norms] does"
            )
        self.schedule.phases(steps)


class Tightening:
    """The masks of the triplets during one retraining. A masked triplet has mu = 0.

    The last mu of a masked triplet is stored, and restored if the triplet is chosen again. This may happen until the cool-down,
    because the importance of masked triplets is still updated from dL/dmu.

    Args:
        triplets: the numbers that the optimiser updates, one container per term. mu is masked in place.
        final: the final budget b_f, in parameters.
        steps: number of steps of the retraining.
        owners: for each term, rank of the process that trains it and scores its importance. Every process has all masks. None:
            this process, which must be the only one.
    """

    def __init__(
        self,
        budget: Adaptive,
        triplets: Sequence[Triplets],
        final: int,
        steps: int,
        processes: OneProcess | None = None,
        owners: Sequence[int] | None = None,
    ) -> None:
        self.schedule, self.rank, self.gradient = budget.schedule, budget.rank, budget.gradient
        self.final, self.steps, self.processes = final, steps, processes or OneProcess()
        self.triplets = list(triplets)
        self.own = [i for i, owner in enumerate(owners or [0] * len(triplets)) if owner == self.processes.rank]
        self.importance = Importance([self.triplets[i] for i in self.own], budget.beta1, budget.beta2)
        self.masks = [torch.ones_like(t.mu, dtype=torch.bool) for t in self.triplets]
        self.waiting = {i: self.triplets[i].mu.detach().clone() for i in self.own}  # mu of masked triplets
        self.sizes = [triplet_size(t.out_features, t.in_features, t.r) for t in self.triplets]
        self.costs = torch.cat([torch.full((t.h,), size) for t, size in zip(self.triplets, self.sizes, strict=True)])
        self.start = int(self.costs.sum())

    @property
    def cool_down(self) -> int:
        """Number of steps after which the masks no longer change."""
        return self.schedule.phases(self.steps)[1]

    def budget(self, done: int) -> int:
        """The budget, in parameters, that the masks obey after `done` steps."""
        return self.schedule.in_force(done, self.steps, self.start, self.final)

    @torch.no_grad()
    def after_gradient(self, done: int, gradients: Sequence[Triplets]) -> None:
        """Update the importance from the gradients of this process's terms, taken after `done` steps."""
        if done < self.cool_down:
            mus = self.whole()
            values = [Triplets(self.triplets[i].A, self.triplets[i].B, mus[i]) for i in self.own]
            self.importance.update(values, gradients)

    @torch.no_grad()
    def after_step(self, done: int) -> Tensor | None:
        """Mask the triplets after an optimiser step. Returns their ranking (count,) if they were chosen again, else None."""
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
        """{term: mu (h,)} of this process's terms, with the stored values of masked triplets."""
        return {i: torch.where(self.masks[i], self.triplets[i].mu, self.waiting[i]) for i in self.own}

    def ranking(self) -> Tensor:
        """The scores by which all triplets of the model are compared: (count,), on the CPU."""
        device = self.triplets[0].mu.device  # other terms may be on other devices
        scores = [torch.zeros(t.h, device=device) for t in self.triplets]
        for i, found in zip(self.own, self.importance.scores(), strict=True):
            scores[i] = found.to(device)
        together = torch.cat(scores)
        self.processes.sum(together)  # each process has zeros for the terms of the others
        return together.cpu() / self.costs if self.rank == "score_per_parameter" else together.cpu()

    def kept(self) -> list[int]:
        """Number of parameters of each term's triplets that are not masked."""
        return [int(mask.sum()) * size for mask, size in zip(self.masks, self.sizes, strict=True)]

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that later steps depend on, for a checkpoint."""
        named = {f"{i}.mask": mask for i, mask in enumerate(self.masks)}
        for i, smoothed, uncertainty in zip(self.own, self.importance.smoothed, self.importance.uncertainty, strict=True):
            named[f"{i}.waiting"] = self.waiting[i]
            for name, t in (("smoothed", smoothed), ("uncertainty", uncertainty)):
                named |= {f"{i}.{name}.A": t.A, f"{i}.{name}.B": t.B, f"{i}.{name}.mu": t.mu}
        return named

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Load the state that tensors() returned."""
        for name, target in self.tensors().items():
            target.copy_(tensors[name])
