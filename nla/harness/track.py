"""Experiment tracking. The record is always written; a tracker shows the same figures elsewhere."""

from pathlib import Path
from typing import Any, Protocol

from nla.budget.plan import Plan
from nla.harness.fits_table import FitRecord
from nla.harness.record import RunRecord


class Tracker(Protocol):
    """Receives the figures of a run as soon as they are known.

    begin: the run starts. `outputs` is a folder in which a tracker may keep its own files.
    fit: one matrix is fitted. `losses` are (step, error) of its fit.
    fitted: the record has all fits, or those before a failure.
    measured: the record has new metrics.
    step: retraining has a new row of its history, see `nla.retrain.history`.
    finish: the run is done or has failed. `folder` is that of the run, with its images.
    """

    def begin(self, record: RunRecord, plan: Plan, outputs: Path) -> None: ...

    def fit(self, fit: FitRecord, losses: list[tuple[int, float]]) -> None: ...

    def fitted(self, record: RunRecord) -> None: ...

    def measured(self, record: RunRecord) -> None: ...

    def step(self, row: dict[str, Any]) -> None: ...

    def finish(self, record: RunRecord, folder: Path) -> None: ...


class NoTracker:
    """A tracker that does nothing (`track=none`)."""

    def begin(self, record: RunRecord, plan: Plan, outputs: Path) -> None:
        pass

    def fit(self, fit: FitRecord, losses: list[tuple[int, float]]) -> None:
        pass

    def fitted(self, record: RunRecord) -> None:
        pass

    def measured(self, record: RunRecord) -> None:
        pass

    def step(self, row: dict[str, Any]) -> None:
        pass

    def finish(self, record: RunRecord, folder: Path) -> None:
        pass
