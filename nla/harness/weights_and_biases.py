"""Experiment tracking with Weights & Biases."""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from nla.budget.plan import Plan
from nla.harness.fits_table import COLUMNS, FitRecord
from nla.harness.record import RunRecord, method_names
from nla.harness.track import Tracker
from nla.harness.tracked_figures import (
    Losses,
    kept_rows,
    largest_errors,
    loss_rows,
    metric_rows,
    point,
    retraining_point,
    summary,
)
from nla.machine.errors import require_choice

log = logging.getLogger(__name__)
CURVES = 10  # matrices in the chart of loss curves
POINTS = 200  # largest number of losses of one matrix in the table of losses


class WandbTracker(Tracker):
    """Weights & Biases: online with an account (WANDB_API_KEY or `wandb login`), else offline. It never prompts.

    An error of W&B ends the tracking, but not the run.

    What W&B receives:

    - Run: its name is that of the run's folder, its group the experiment or the sweep, its job type the method and kernel.
    - Id: the signature. A killed run that is started again tracks all figures from the beginning, also those from the cache,
      under the same id. By W&B's documentation it then overwrites the earlier run. W&B cannot resume a run offline (0.31), so
      there are two folders with this id; the later one is complete, and `wandb sync` uploads it last.
    - Summary: `tracked_figures.summary`, as soon as a figure is known.
    - Charts `fits/...`: errors of the matrices over their number, in the order of the model. They grow while fits run, and
      W&B draws several runs in one chart, which it does not do for tables.
    - Charts `retrain/...`: the history of retraining over its steps.
    - Tables: `plan`; `fits` (the columns of fits.csv), also of a failed run; `metrics`; `continuations`; `kept` if retrained.
    - Losses: only of matrices that took steps. The table `losses` has all of them, with at most 200 points each, because W&B
      cuts a table after 200,000 rows (losses.jsonl has every point). The chart `largest_errors` has the curves of the ten
      matrices with the largest errors. One chart for each matrix would be hundreds of charts.
    - Images `images/...` of a finished run, and system metrics.

    A workspace to save: group the runs by Group, then by Job type. Columns of the run table: perplexity/dense,
    perplexity/compressed, perplexity/retrained, error, to_svd, to_svd_llm, ratio, bytes, peak_bytes, seconds. Panels: a bar
    chart of perplexity/compressed and of perplexity/retrained (logarithmic); a scatter plot of ratio and perplexity/compressed;
    line plots of fits/to_svd and fits/error over fits/matrix, and of retrain/loss, retrain/watched_perplexity and retrain/kept
    over retrain/step; `largest_errors`; the tables `fits` and `kept`. Hide all other panels.

    Args:
        project: W&B project.
        mode: `online`, `offline`, or `auto`: the value of WANDB_MODE if it is set, else online with an account.
        group: W&B group; None for a single run without one.
    """

    def __init__(self, project: str, mode: str, group: str | None) -> None:
        require_choice("track.mode", mode, ["auto", "online", "offline"])
        self.project, self.mode, self.group = project, mode, group
        self.run: Any = None
        self.count = 0  # of fits
        self.curves: dict[str, Losses] = {}

    def begin(self, record: RunRecord, plan: Plan, outputs: Path) -> None:
        self._safely(self._begin, record, plan, outputs)

    def fit(self, fit: FitRecord, losses: Losses) -> None:
        self._safely(self._fit, fit, losses)

    def fitted(self, record: RunRecord) -> None:
        self._safely(self._fitted, record)

    def measured(self, record: RunRecord) -> None:
        self._safely(lambda: self.run.summary.update(summary(record)))

    def step(self, row: dict[str, Any]) -> None:
        self._safely(lambda: self._log("retrain", retraining_point(row)))

    def finish(self, record: RunRecord, folder: Path) -> None:
        self._safely(self._finish, record, folder)

    def _safely(self, action: Any, *arguments: Any) -> None:
        """Call a function that uses W&B. An exception ends the tracking, but not the run."""
        if action != self._begin and self.run is None:
            return
        try:
            action(*arguments)
        except Exception as error:
            log.warning("Weights & Biases failed (%s); the run continues, and its figures are in the record", error)
            if self.run is not None:
                with suppress(Exception):
                    self.run.finish(exit_code=1)
            self.run = None

    def _begin(self, record: RunRecord, plan: Plan, outputs: Path) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        self.run = self._start(record, outputs)
        log.info("Weights & Biases: %s", self.run.url or self.run.dir.removesuffix("/files"))
        for prefix, number in (("fits", "matrix"), ("retrain", "step")):
            self.run.define_metric(f"{prefix}/{number}", summary="none", hidden=True)
            self.run.define_metric(f"{prefix}/*", step_metric=f"{prefix}/{number}", summary="none")
        self._table("plan", ["matrix", "bits", "terms"], [[m.spec.name, m.bits, m.term.describe()] for m in plan.matrices])

    def _start(self, record: RunRecord, outputs: Path) -> Any:
        """A new W&B run. If W&B cannot be reached, it is offline."""
        import wandb

        modes = [self._mode()]
        if modes == ["online"]:
            modes.append("offline")
        for mode in modes:
            try:
                return wandb.init(
                    project=self.project,
                    id=record.signature,
                    name=record.name,
                    group=self.group,
                    job_type="-".join(method_names(record.config)),
                    reinit="create_new",
                    dir=outputs,
                    mode=mode,
                    config=record.config,
                    settings=wandb.Settings(init_timeout=30, finish_timeout=120, console="off"),
                )
            except Exception as error:
                if mode == modes[-1]:
                    raise
                log.warning("Weights & Biases cannot be reached (%s); tracking offline", error)

    def _mode(self) -> Any:
        asked = (os.environ.get("WANDB_MODE") if self.mode == "auto" else self.mode) or "online"
        if asked == "online" and not has_account():
            return "offline"
        return asked

    def _log(self, prefix: str, figures: dict[str, float]) -> None:
        self.run.log({f"{prefix}/{name}": value for name, value in figures.items()})

    def _table(self, name: str, columns: list[Any], rows: list[Any]) -> None:
        import wandb

        if rows:
            self.run.log({name: wandb.Table(columns=columns, data=rows)})

    def _fit(self, fit: FitRecord, losses: Losses) -> None:
        self.count += 1
        if fit.steps:
            self.curves[fit.name] = losses
        self._log("fits", {"matrix": self.count} | point(fit))

    def _fitted(self, record: RunRecord) -> None:
        import wandb

        self.run.summary.update(summary(record))
        self._table("fits", COLUMNS, [list(fit.model_dump().values()) for fit in record.fits])
        self._table("losses", ["matrix", "step", "loss"], loss_rows(self.curves, POINTS))
        worst = largest_errors(self.curves, record.fits, CURVES)
        if worst:
            steps, losses = ([[pair[i] for pair in curve] for curve in worst.values()] for i in (0, 1))
            chart = wandb.plot.line_series(steps, losses, list(worst), "error of the matrices with the largest errors", "step")
            self.run.log({"largest_errors": chart})

    def _finish(self, record: RunRecord, folder: Path) -> None:
        import wandb

        self._table("metrics", ["stage", "task", "data", "metric", "value", "stderr"], metric_rows(record))
        prompt = record.config.get("prompt")
        rows = [[stage, prompt, text] for stage, text in record.continuations.items()]
        self._table("continuations", ["stage", "prompt", "text"], rows)
        self._table("kept", ["matrix", "fitted", "kept", "kept_fraction"], kept_rows(record))
        if record.status == "done":
            self.run.log({f"images/{figure.stem}": wandb.Image(figure) for figure in sorted(folder.glob("*.png"))})
        self.run.summary.update(summary(record))
        self.run.finish(exit_code=0 if record.status == "done" else 1)


def has_account() -> bool:
    """Whether W&B can log in without a prompt: by its settings, the environment, or the file that `wandb login` wrote."""
    import wandb

    try:
        from wandb.sdk.lib.wbauth import authenticate_session
    except ImportError:  # not part of W&B's interface
        return bool(os.environ.get("WANDB_API_KEY"))
    host = wandb.setup().settings.base_url
    try:
        return authenticate_session(host=host, source="nla", prompt=False, update_session=False) is not None
    except (wandb.Error, OSError, ValueError):
        return False
