"""Checkpoints, from which a training resumes."""

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
    """The progress of a training.

    Attributes:
        done: number of steps done.
        smoothed: running average of the loss, which the loss of the next step is compared with; None before the first step.
        peak_bytes: peak memory of the gradient of one micro-batch.
        moments: {parameter name: its optimiser state}, for the parameters that this process owns.
    """

    done: int = 0
    smoothed: float | None = None
    peak_bytes: int = 0
    moments: dict[str, dict[str, Tensor]] = field(default_factory=dict)


class Checkpoints:
    """Saves and loads the state of a training: one file for each process, and one file with the step that all of them are of.

    Args:
        key: cache key of the training.
        own: the parameters whose optimiser state this process keeps.
        observer: its state is saved and loaded too.
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
        """Step of the last complete checkpoint, or 0."""
        return self.cache.load_json("trainings", self.key) or 0

    def name(self, step: int) -> str:
        """Cache key of this process's file."""
        return f"{self.key}.{step}.{self.processes.rank}"

    def told(self) -> str:
        """Part of an error message: the step and the file of the last checkpoint."""
        step = self.step()
        path = self.cache.root / "trainings" / f"{self.name(step)}.safetensors"
        return f"the last good checkpoint is of step {step}, {path}" if path.exists() else "there is no checkpoint before it"

    def save(self, progress: Progress) -> None:
        """Save the current state and remove the previous checkpoint. A kill at any moment leaves one of the two complete."""
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
        """Load the last checkpoint into parameters and observer. Returns None unless every process can read its file."""
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
    """The tensors whose names begin with `prefix` and a dot, under their names without it."""
    return {name.removeprefix(f"{prefix}."): t for name, t in tensors.items() if name.startswith(f"{prefix}.")}
