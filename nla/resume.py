"""Checkpoints of a training."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nla.cache import Cache
from nla.crew import Crew
from nla.trained import Companion, Trained


class Checkpoints:
    """The state before a step, one file for each process; which step all of them are of stands beside them.

    Args:
        own: what this process keeps the optimiser's numbers of.
    """

    def __init__(
        self,
        cache: Cache,
        key: str,
        own: Sequence[Trained],
        optimiser: torch.optim.Optimizer,
        companion: Companion,
        crew: Crew,
    ) -> None:
        self.cache, self.key, self.own, self.optimiser = cache, key, own, optimiser
        self.companion, self.crew = companion, crew

    def step(self) -> int:
        """Of the last checkpoint that is whole; 0: there is none."""
        return self.cache.load_json("trainings", self.key) or 0

    def name(self, step: int) -> str:
        return f"{self.key}.{step}.{self.crew.rank}"

    def told(self) -> str:
        """Where the last good state is, for a person."""
        step = self.step()
        path = self.cache.root / "trainings" / f"{self.name(step)}.safetensors"
        return f"the last good checkpoint is of step {step}, {path}" if step else "there is no checkpoint before it"

    def save(self, step: int, smoothed: float, peak: int) -> None:
        """The state before `step`, in place of an earlier one; killed at any moment, it leaves one of the two."""
        before = self.step()
        tensors = {f"model.{t.name}": t.master for t in self.own}
        for i, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"optimiser.{i}.{name}": value for name, value in state.items()}
        tensors |= {f"companion.{name}": value for name, value in self.companion.tensors().items()}
        notes = {"smoothed": smoothed, "peak": peak, "companion": self.companion.notes()}
        self.cache.store_tensors("trainings", self.name(step), tensors, notes)
        self.crew.wait()
        if self.crew.rank == 0:
            self.cache.store_json("trainings", self.key, step)
        self.crew.wait()
        self.cache.remove("trainings", self.name(before))

    def restore(self) -> tuple[int, float | None, int]:
        """Load the last checkpoint, if there is one: the step to go on with, the smoothed loss, peak bytes."""
        step = self.step()
        entry = self.cache.load_tensors("trainings", self.name(step))
        (found,) = self.crew.total(entry is not None)
        if entry is None or found < self.crew.size:
            return 0, None, 0
        tensors, notes = entry
        for t in self.own:
            t.master.copy_(tensors[f"model.{t.name}"])
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in under("optimiser", tensors).items():
            i, _, quantity = name.partition(".")
            state.setdefault(int(i), {})[quantity] = value
        self.optimiser.load_state_dict(self.optimiser.state_dict() | {"state": state})
        self.companion.restore(under("companion", tensors), notes["companion"])
        return step, notes["smoothed"], notes["peak"]


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The tensors whose names begin with `prefix` and a dot, without it."""
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
