"""Attacks by signals: a run or a sweep that is told to stop records it, and leaves neither files nor processes behind."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests import forked
from tests.attack.ends import MARK, QUICK, SLOW, drafts, faults, going_on
from tests.conftest import SHORT, command, only_record, records


def stopped(outputs: Path, arguments: list[str], sign: int, moment, fresh: bool = False) -> subprocess.CompletedProcess:
    """Start a run, send it a signal as soon as moment() is true, and give its end."""
    outputs.mkdir(exist_ok=True)
    said, environment = outputs.parent / "said", {MARK: str(outputs)}
    said.mkdir()
    asked = command(outputs, *arguments)
    if fresh:
        with (said / "stdout").open("w") as out, (said / "stderr").open("w") as err:
            started = {"cwd": forked.ROOT, "env": os.environ | environment, "stdout": out, "stderr": err}
            process = subprocess.Popen([sys.executable, *asked], **started)
        alive, join = lambda: process.poll() is None, lambda: process.wait(60)
    else:
        process = forked.start(asked, environment, said)
        alive, join = process.is_alive, lambda: process.join(60)
    while alive() and not moment():
        time.sleep(0.01)
    os.kill(process.pid, sign)
    begun = time.monotonic()
    join()
    code = process.returncode if fresh else process.exitcode
    assert time.monotonic() - begun < 20
    return subprocess.CompletedProcess(asked, code, *((said / name).read_text() for name in ("stdout", "stderr")))


TWO = [*SHORT, "retrain.steps=200", "retrain.processes=2"]
MOMENTS = {
    "evaluation": ([*QUICK[:-2], "task.max_windows=null"], "cache/windows/*.jsonl"),
    "fits": (SLOW, "runs/*/losses.jsonl"),
    "retraining": ([*SHORT, "retrain.steps=2000"], "cache/trainings/*.json"),
    "two processes": (TWO, "cache/trainings/*.json"),
}
SIGNALS = [(signal.SIGTERM, moment) for moment in MOMENTS] + [(signal.SIGINT, "fits")]


@pytest.mark.parametrize("sign, moment", SIGNALS, ids=lambda value: getattr(value, "name", value))
def test_a_run_that_is_told_to_stop_records_it_and_leaves_nothing(tmp_path, sign, moment):
    arguments, reached = MOMENTS[moment]
    outputs = tmp_path / "outputs"
    end = stopped(outputs, arguments, sign, lambda: any(outputs.glob(reached)))
    assert not faults(end, outputs, 128 + sign, None, "failed", str(outputs))
    word = "terminated" if sign == signal.SIGTERM else "interrupted"
    assert only_record(outputs)["error"] == word and f"{word}; the same command continues from here" in end.stderr


def test_a_signal_is_not_lost_where_python_ignores_exceptions():
    code = """
import os, signal, sys, time
from nla.machine.ending import Stopped, leave, stoppable

class Deaf:
    def __del__(self):
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.05)

try:
    with stoppable():
        Deaf()
        time.sleep(5)
except Stopped as stopped:
    print(stopped)
    leave(stopped)
"""
    end = forked.finish(["-c", code])
    assert (end.returncode, end.stdout, end.stderr) == (143, "terminated\n", "")


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep_that_is_told_to_stop_ends_with_its_table_and_without_orphans(tmp_path, launcher):
    outputs = tmp_path / "outputs"
    both = [f"hydra/launcher={launcher}", *(["hydra.launcher.n_jobs=2"] if launcher == "joblib" else [])]
    begun = 1 if launcher == "basic" else 2
    reached = lambda: len(list(outputs.glob("runs/*/losses.jsonl"))) == begun  # noqa: E731
    arguments = ["-m", *SLOW, "seed=0,1,2", *both]
    end = stopped(outputs, arguments, signal.SIGTERM, reached, fresh=launcher == "joblib")
    found = records(outputs)
    assert end.returncode == 143 and "Traceback" not in end.stdout + end.stderr
    assert [(record["status"], record["error"]) for record in found] == [("failed", "terminated")] * begun
    assert re.search(r"failed: .*seed=0.*: terminated", end.stdout) and not drafts(outputs) and not going_on(str(outputs))
