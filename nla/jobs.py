"""One job or many: failures become one clear line, a sweep goes on after one and ends with a table of all."""

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
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nla.harness.settings import check_settings
from nla.machine.errors import NonFiniteError, UserError

log = logging.getLogger(__name__)
CONF = Path(__file__).resolve().parent.parent / "conf"
FAILED = 2
_exit_code = 0


def exit_code() -> int:
    """0 if every job of this process succeeded."""
    return _exit_code


def attempt(cfg: DictConfig) -> None:
    """Run one job. What a user can mend is one line; in a sweep nothing stops the other jobs."""
    global _exit_code
    settings = HydraConfig.get()
    sweeping = settings.mode == RunMode.MULTIRUN
    outcome: dict[str, Any] = {"overrides": list(settings.overrides.task)}
    try:
        checked = check_settings(cfg)
        from nla.pipeline import run

        record = run(checked, command_line(outcome["overrides"] if sweeping else sys.argv[1:]))
        outcome["folder"] = record and str(Path(cfg.outputs_dir) / "runs" / record.name)
    except (UserError, NonFiniteError) as error:
        log.error("error: %s", error)
        outcome["error"], _exit_code = str(error), FAILED
    except Exception as error:
        if not sweeping:
            raise
        log.exception("this job failed; the sweep goes on")
        outcome["error"], _exit_code = f"{type(error).__name__}: {error}", FAILED
    if sweeping:
        folder = Path(settings.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"job-{settings.job.num}.json").write_text(json.dumps(outcome))


def command_line(arguments: list[str]) -> str:
    """What one types for this job alone."""
    return shlex.join(["python", "run.py", *arguments])


class SweepTable(Callback):
    """Hydra calls this in the process that launched the jobs, wherever those ran."""

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        global _exit_code
        from nla.harness.terminal import show_sweep

        configure_log(config.hydra.job_logging)  # the jobs may have run, and logged, in other processes
        files = sorted(Path(config.hydra.sweep.dir).glob("job-*.json"), key=lambda p: int(p.stem.split("-")[1]))
        outcomes = [json.loads(file.read_text()) for file in files]
        if len(outcomes) > 1:  # one row of an experiment has said what there is to say
            show_sweep(outcomes)
        if any("error" in outcome for outcome in outcomes):
            _exit_code = FAILED


def explain_unknown_keys(arguments: list[str]) -> None:
    """After Hydra refused a command line: for each setting that does not exist, print those that do."""
    keys = [a.partition("=")[0] for a in arguments if "=" in a and a[0] not in "+~-"]
    groups = {path.name for path in CONF.iterdir() if path.is_dir()}
    chosen = [a for a in arguments if a.partition("=")[0] in groups and "," not in a]
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose("config", overrides=chosen)
    except (HydraException, OmegaConfBaseException):
        return  # a group's value is wrong, and Hydra has listed the allowed ones
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
