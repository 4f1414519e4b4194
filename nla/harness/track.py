"""Experiment tracking. The record is always written; a tracker shows the same figures elsewhere."""

import logging
import os
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from nla.budget.importance import IMPORTANCE_QUANTILES
from nla.budget.plan import Plan
from nla.harness.fits_table import FitRecord
from nla.harness.record import RunRecord
from nla.machine.errors import require_choice

log = logging.getLogger(__name__)


class Tracker(Protocol):
    """Receives the figures of a run as soon as they are known.

    `outputs` is a folder in which a tracker may keep its own files. `folder` is that of the run, with its images.
    """

    def begin(self, record: RunRecord, plan: Plan, outputs: Path) -> None: ...

    def fit(self, fit: FitRecord, losses: list[tuple[int, float]]) -> None: ...

    def metrics(self, stage: str, figures: dict[str, float]) -> None: ...

    def step(self, row: dict[str, Any]) -> None: ...

    def finish(self, record: RunRecord, folder: Path) -> None: ...


class NoTracker:
    """A tracker that does nothing (`track=none`)."""

    def begin(self, record: RunRecord, plan: Plan, outputs: Path) -> None:
        pass

    def fit(self, fit: FitRecord, losses: list[tuple[int, float]]) -> None:
        pass

    def metrics(self, stage: str, figures: dict[str, float]) -> None:
        pass

    def step(self, row: dict[str, Any]) -> None:
        pass

    def finish(self, record: RunRecord, folder: Path) -> None:
        pass


class WandbTracker:
    """Weights & Biases: online with an account (WANDB_API_KEY or `wandb login`), else offline. It never prompts.

    An error of W&B ends the tracking, but not the run.

    Args:
        project: W&B project.
        mode: `online`, `offline`, or `auto`: the value of WANDB_MODE if it is set, else online with an account.
    """

    def __init__(self, project: str, mode: str) -> None:
        require_choice("track.mode", mode, ["auto", "online", "offline"])
        self.project, self.mode = project, mode
        self.run: Any = None

    def begin(self, record: RunRecord, plan: Plan, outputs: Path) -> None:
        self._safely(self._begin, record, plan, outputs)

    def fit(self, fit: FitRecord, losses: list[tuple[int, float]]) -> None:
        self._safely(self._fit, fit, losses)

    def metrics(self, stage: str, figures: dict[str, float]) -> None:
        self._safely(self._metrics, stage, figures)

    def step(self, row: dict[str, Any]) -> None:
        self._safely(self._step, row)

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
        import wandb

        modes = [self._mode()]
        if modes == ["online"]:
            modes.append("offline")
        for mode in modes:
            try:
                self.run = wandb.init(
                    project=self.project,
                    name=record.name,
                    group=record.name,  # a run that was killed and continued is two runs in W&B
                    reinit="create_new",
                    dir=outputs,
                    mode=mode,
                    config=record.config,
                    settings=wandb.Settings(init_timeout=30, finish_timeout=120, console="off", x_disable_stats=True),
                )
                break
            except Exception as error:
                if mode == modes[-1]:
                    raise
                log.warning("Weights & Biases cannot be reached (%s); tracking offline", error)
        log.info("Weights & Biases: %s", self.run.url or self.run.dir.removesuffix("/files"))
        self.run.define_metric("fit/step")
        self.run.define_metric("loss/*", step_metric="fit/step")
        self.run.define_metric("retrain/step")
        self.run.define_metric("retrain/*", step_metric="retrain/step")
        rows: list[Any] = [[m.spec.name, m.bits, m.term.describe()] for m in plan.matrices]
        self.run.log({"plan": wandb.Table(columns=["matrix", "bits", "terms"], data=rows)})

    def _mode(self) -> Any:
        asked = (os.environ.get("WANDB_MODE") if self.mode == "auto" else self.mode) or "online"
        if asked == "online" and not has_account():
            return "offline"
        return asked

    def _fit(self, fit: FitRecord, losses: list[tuple[int, float]]) -> None:
        for step, loss in losses:
            self.run.log({"fit/step": step, f"loss/{fit.name}": loss})
        figures = {key: value for key, value in fit.model_dump().items() if isinstance(value, int | float)}
        self.run.log({f"fit/{fit.name}/{key}": value for key, value in figures.items()})

    def _metrics(self, stage: str, figures: dict[str, float]) -> None:
        self.run.log({f"{stage}/{key}": value for key, value in figures.items()})

    def _step(self, row: dict[str, Any]) -> None:
        figures = {name: value for name, value in row.items() if isinstance(value, int | float)}
        figures |= {f"importance/{q:.0%}": x for q, x in zip(IMPORTANCE_QUANTILES, row.get("importance", []), strict=False)}
        figures |= {f"kept/{name}": kept for name, kept in row.get("matrices", {}).items()}
        self.run.log({f"retrain/{name}": value for name, value in figures.items()})

    def _finish(self, record: RunRecord, folder: Path) -> None:
        import wandb

        if record.status == "done":
            self.run.log({figure.stem: wandb.Image(figure) for figure in sorted(folder.glob("*.png"))})
        if record.parameters is not None:
            self.run.summary.update({f"parameters/{k}": v for k, v in record.parameters.model_dump().items()})
        if record.bits is not None:
            self.run.summary.update({f"bits/{k}": v for k, v in record.bits.model_dump().items()})
        self.run.summary.update({f"peak_bytes/{stage}": value for stage, value in record.peak_bytes.items()})
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
