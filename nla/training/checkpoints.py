"""Checkpoints of a training."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from nla.machine.cache import Cache
from nla.training.observer import Observer
from nla.training.parameters import TrainedParameter
from nla.training.processes import OneProcess


@dataclass
class Progress:
    """Where a training stands.

    Attributes:
        done: steps.
        smoothed: the loss that the next step's is compared with.
        peak_bytes: of one micro-batch's gradient.
        moments: what the optimiser keeps of the parameters of this process, by their names.
    """

    done: int = 0
    smoothed: float | None = None
    peak_bytes: int = 0
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class Checkpoints:
    """The state before a step, one file for each process; which step all of them are of stands beside them.

    Args:
        own: what this process keeps the optimiser's numbers of.
    """

    def __init__(
        self,
        cache: Cache,
        key: str,
        own: Sequence[TrainedParameter],
        observer: Observer,
        processes: OneProcess,
    ) -> None:
        self.cache, self.key, self.own, self.observer, self.processes = cache, key, own, observer, processes

    def step(self) -> int:
        """Of the last checkpoint that is whole; 0: there is none."""
        return self.cache.load_json("trainings", self.key) or 0

    def name(self, step: int) -> str:
        return f"{self.key}.{step}.{self.processes.rank}"

    def told(self) -> str:
        """Where the last good state is, for a person."""
        step = self.step()
        path = self.cache.root / "trainings" / f"{self.name(step)}.safetensors"
        return f"the last good checkpoint is of step {step}, {path}" if path.exists() else "there is no checkpoint before it"

    def save(self, progress: Progress) -> None:
        """The state now, in place of an earlier one; killed at any moment, it leaves one of the two."""
        before = self.step()
        tensors = {f"model.{t.name}": t.master for t in self.own}
        for name, moments in progress.moments.items():
            tensors |= {f"optimiser.{quantity}.{name}": value for quantity, value in moments.items()}
        tensors |= {f"observer.{name}": value for name, value in self.observer.tensors().items()}
        notes = {"smoothed": progress.smoothed, "peak": progress.peak_bytes, "observer": self.observer.notes()}
        self.cache.store_tensors("trainings", self.name(progress.done), tensors, notes)
        self.processes.wait()
        if self.processes.rank == 0:
            self.cache.store_json("trainings", self.key, progress.done)
        self.processes.wait()
        if before != progress.done:
            self.cache.remove("trainings", self.name(before))

    def restore(self) -> Progress | None:
        """Load the last checkpoint, if there is one."""
        step = self.step()
        entry = self.cache.load_tensors("trainings", self.name(step))
        (found,) = self.processes.total(entry is not None)
        if entry is None or found < self.processes.size:
            return None
        tensors, notes = entry
        for t in self.own:
            t.master.copy_(tensors[f"model.{t.name}"])
        moments: dict[str, dict[str, Tensor]] = {t.name: {} for t in self.own}
        devices = {t.name: t.master.device for t in self.own}
        for key, value in under("optimiser", tensors).items():
            quantity, _, name = key.partition(".")
            moments[name][quantity] = value.to(devices[name])
        self.observer.restore(under("observer", tensors), notes["observer"])
        return Progress(step, notes["smoothed"], notes["peak"], moments)


def under(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """The tensors whose names begin with `prefix` and a dot, without it."""
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
