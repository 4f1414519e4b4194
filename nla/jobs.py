"""Runs one job, or the jobs of a sweep. An error is one line; a sweep continues after it and ends with a table."""

import difflib
import json
import logging
import shlex
import sys
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import configure_log
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from nla.harness.settings import check_settings
from nla.machine.errors import NonFiniteError, UserError

log = logging.getLogger(__name__)
CONF = Path(__file__).resolve().parent.parent / "conf"
FAILED = 2
_exit_code = 0
_fault: Exception | None = None  # an error of a job that is the program's, not the user's


def exit_code() -> int:
    """Exit code of this process: 0 if every job succeeded, else 2."""
    return _exit_code


def attempt(cfg: DictConfig) -> None:
    """Run one job. An error that the user can correct is logged as one line. In a sweep, no error stops the other jobs."""
    global _exit_code, _fault
    settings = HydraConfig.get()
    sweeping = settings.mode == RunMode.MULTIRUN
    outcome: dict[str, Any] = {"overrides": OmegaConf.to_container(settings.overrides.task)}
    try:
        checked = check_settings(cfg)
        from nla.pipeline import run

        if sweeping and "group" in checked["track"]:
            checked["track"]["group"] = checked["track"]["group"] or sweep_name(settings)
        command = command_line(outcome["overrides"] if sweeping else sys.argv[1:])
        record = run(checked, command, outcome["overrides"])
        outcome["folder"] = record and str(Path(cfg.outputs_dir) / "runs" / record.name)
    except (UserError, NonFiniteError) as error:
        log.error("error: %s", error)
        outcome["error"], _exit_code = str(error), FAILED
    except Exception as error:
        if not sweeping:
            _fault = error
            raise
        log.exception("this job failed; the sweep continues")
        outcome["error"], _exit_code = f"{type(error).__name__}: {error}", FAILED
    if sweeping:
        folder = Path(settings.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"job-{settings.job.num}.json").write_text(json.dumps(outcome))


def refuse(error: Exception) -> None:
    """Say why Hydra could not compose the settings of a command line, and end with exit code 1.

    Raises:
        Exception: the error, if it is a fault of the program: it is shown with its traceback.
    """
    if error is _fault:
        raise error
    print(f"error: the settings {shlex.join(sys.argv[1:])} cannot be read: {str(error).strip()}", file=sys.stderr)
    explain_unknown_keys(sys.argv[1:])
    sys.exit(1)


def sweep_name(settings: Any) -> str:
    """The experiment of a sweep, or the name of the sweep's folder, from Hydra's own settings."""
    return settings.runtime.choices.get("experiment") or Path(settings.sweep.dir).name


def command_line(arguments: list[str]) -> str:
    """The command line that runs a job with these arguments alone."""
    return shlex.join(["python", "run.py", *arguments])


class SweepTable(Callback):
    """Hydra callback that logs the table of a sweep and draws its figure, in the process that launched the jobs."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        global _exit_code
        from nla.harness.terminal import show_sweep
        from nla.stages.draw import draw_sweep

        configure_log(config.hydra.job_logging)  # the jobs may have run, and logged, in other processes
        files = sorted(Path(config.hydra.sweep.dir).glob("job-*.json"), key=lambda p: int(p.stem.split("-")[1]))
        outcomes = [json.loads(file.read_text()) for file in files]
        if len(outcomes) > 1:  # a single job has already shown its result
            show_sweep(outcomes)
            draw_sweep([Path(outcome["folder"]) for outcome in outcomes if outcome.get("folder")], Path(config.hydra.sweep.dir))
        if any("error" in outcome for outcome in outcomes):
            _exit_code = FAILED


def explain_unknown_keys(arguments: list[str]) -> None:
    """Print, for each unknown setting of a command line that Hydra refused, the settings that exist."""
    keys = [a.partition("=")[0] for a in arguments if "=" in a and a[0] not in "+~-"]
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    chosen = [a for a in arguments if a.partition("=")[0] in groups and "," not in a]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", overrides=chosen)
    except Exception:  # what Hydra raises is not known
        return  # an option of a group is wrong, and Hydra has listed the allowed ones
    for key in keys:
        parent, _, name = key.rpartition(".")
        section = OmegaConf.select(cfg, parent) if parent else cfg
        if section is None and parent.partition(".")[0] in groups:
            print(f"\n{key} is not a setting while no {parent} is chosen; choose one, {parent}=<option>", file=sys.stderr)
        if key.startswith("hydra") or not isinstance(section, DictConfig) or name in section:
            continue
        allowed = sorted(k for k in map(str, section) if not k.startswith("_"))
        near = difflib.get_close_matches(name, allowed, 1)
        prefix = f"{parent}." if parent else ""
        meant = f"; did you mean {prefix}{near[0]}?" if near else ""
        print(f"\n{key} is not a setting{meant} Allowed: {', '.join(prefix + k for k in allowed)}", file=sys.stderr)
