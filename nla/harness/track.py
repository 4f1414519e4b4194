"""Experiment tracking. The record is always written; a tracker shows the same figures elsewhere."""

from pathlib import Path
from typing import Any

from nla.budget.plan import Plan
from nla.harness.fits_table import FitRecord
from nla.harness.record import RunRecord


class Tracker:
    """Receives the figures of a run as soon as they are known. This one ignores them (`track=none`)."""

    def begin(self, record: RunRecord, plan: Plan, outputs: Path) -> None:
        """The run starts. `outputs` is a folder in which a tracker may keep its own files."""

    def fit(self, fit: FitRecord, losses: list[tuple[int, float]]) -> None:
        """One matrix is fitted. `losses` are (step, error) of its fit."""

    def fitted(self, record: RunRecord) -> None:
        """The record has all fits, or those before a failure."""

    def measured(self, record: RunRecord) -> None:
        """The record has new metrics."""

    def step(self, row: dict[str, Any]) -> None:
        """Retraining has a new row of its history, see `nla.retrain.history`."""

    def finish(self, record: RunRecord, folder: Path) -> None:
        """The run is done or has failed. `folder` is that of the run, with its images."""
