"""Runs one job, or the jobs of a sweep. An error is one line; a sweep continues after it and ends with a table."""

import json
import logging
import shlex
import signal
import sys
import traceback
from concurrent.futures import BrokenExecutor
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from nla.harness.settings import check_settings
from nla.harness.unknown_settings import print_errors, unknown_settings
from nla.machine.ending import Stopped, die_with_parent, leave, stoppable
from nla.machine.errors import NonFiniteError, UserError
from nla.machine.files import reserved, write_atomically

log = logging.getLogger(__name__)
FAILED = 2
_exit_code = 0
_sweep: DictConfig | None = None  # the settings of the sweep that this process has launched, until its table is shown
_unsaved: list[dict[str, Any]] = []  # outcomes of its jobs that could not be written
_fault: Exception | None = None  # an error of a job that is the program's, not the user's


def exit_code() -> int:
    """Exit code of this process: 0 if every job succeeded, else 2."""
    return _exit_code


@stoppable()
def attempt(cfg: DictConfig) -> None:
    """Run one job. An error that the user can correct is logged as one line. In a sweep, no error stops the other jobs.

    Raises:
        Stopped: a signal told this process to stop. A process that runs jobs for another one ends here.
    """
    global _exit_code, _fault
    settings = HydraConfig.get()
    sweeping = settings.mode == RunMode.MULTIRUN
    for_another = sweeping and _sweep is None  # a launcher such as joblib has started this process
    outcome: dict[str, Any] = {"overrides": OmegaConf.to_container(settings.overrides.task)}
    stopped: Stopped | None = None
    if for_another:
        die_with_parent(signal.SIGTERM)
    try:
        outcome["folder"] = run_job(cfg, settings, sweeping)
    except (UserError, NonFiniteError) as error:
        print_errors([str(error)])
        outcome["error"], _exit_code = str(error), FAILED
    except Stopped as error:
        outcome["error"], stopped = str(error), error
    except Exception as error:
        if not sweeping:
            _fault = error
            raise
        log.exception("this job failed; the sweep continues")
        outcome["error"], _exit_code = f"{type(error).__name__}: {error}", FAILED
    if sweeping:
        keep(outcome, settings)
    if stopped is not None:
        if for_another:
            leave(stopped)
        raise stopped


def run_job(cfg: DictConfig, settings: Any, sweeping: bool) -> str | None:
    """Run the pipeline, and return the folder of its record. A dry run has none."""
    checked = check_settings(cfg)
    from nla.pipeline import run

    if sweeping and "group" in checked["track"]:
        checked["track"]["group"] = checked["track"]["group"] or sweep_name(settings)
    arguments = list(settings.overrides.task)
    record = run(checked, command_line(arguments if sweeping else sys.argv[1:]), arguments)
    return None if record is None else str(Path(cfg.outputs_dir) / "runs" / record.name)


def keep(outcome: dict[str, Any], settings: Any) -> None:
    """Keep the outcome of a job for the table of its sweep: in the sweep's folder, or if that fails in this process.

    Raises:
        SystemExit: neither is possible, because another process makes the table. The sweep stops.
    """
    try:
        write_atomically(Path(settings.sweep.dir) / f"job-{settings.job.num}.json", json.dumps(outcome).encode())
    except UserError as error:
        if _sweep is None:
            log.error("the sweep stops, because this job cannot be added to its table: %s", error)
            sys.exit(FAILED)
        _unsaved.append(outcome)


def refuse(error: Exception) -> None:
    """Say why Hydra could not compose the settings of a command line, and end with exit code 1.

    If the error is the program's own, or that of a launcher whose process was killed, it is shown with its traceback, after the
    table of the sweep, and the exit code is that of a failure.
    """
    if error is _fault or isinstance(error, BrokenExecutor):
        show_table()
        traceback.print_exception(error)
        sys.exit(FAILED)
    # Hydra's advice to add a setting with + is left out, see check_arguments()
    reason = "\n".join(line for line in str(error).strip().splitlines() if "To append to your config" not in line)
    print_errors(unknown_settings(sys.argv[1:]) or [f"the settings {shlex.join(sys.argv[1:])} cannot be read: {reason}"])
    sys.exit(1)


def sweep_name(settings: Any) -> str:
    """The experiment of a sweep, or the name of the sweep's folder, from Hydra's own settings."""
    return settings.runtime.choices.get("experiment") or Path(settings.sweep.dir).name


def command_line(arguments: list[str]) -> str:
    """The command line that runs a job with these arguments alone."""
    return shlex.join(["python", "run.py", *arguments])


class SweepTable(Callback):
    """Hydra callback that remembers the sweep whose table is shown at the end, in the process that launches the jobs."""

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        global _sweep
        folder = Path(config.hydra.sweep.dir)
        try:
            with reserved(folder / ".reserve"):  # there is space for what Hydra writes, whose errors it shows as tracebacks
                _sweep = config
        except UserError as error:
            print_errors([str(error)])
            sys.exit(FAILED)


def show_table() -> None:
    """Log the table and draw the figure of the sweep that this process launched, once. It may have been stopped early."""
    global _exit_code, _sweep
    if _sweep is None:
        return
    from nla.harness.show_result import show_sweep
    from nla.stages.draw import draw_sweep

    config, _sweep = _sweep, None
    configure_log(config.hydra.job_logging)  # the jobs may have run, and logged, in other processes
    files = sorted(Path(config.hydra.sweep.dir).glob("job-*.json"), key=lambda p: int(p.stem.split("-")[1]))
    outcomes = [*(json.loads(file.read_text()) for file in files), *_unsaved]
    failed = any("error" in outcome for outcome in outcomes)
    if len(outcomes) > 1 or failed:  # a single job that ended well has already shown its result
        show_sweep(outcomes)
        done = [Path(outcome["folder"]) for outcome in outcomes if outcome.get("folder") and "error" not in outcome]
        draw_sweep(done, Path(config.hydra.sweep.dir))
    if failed:
        _exit_code = FAILED
