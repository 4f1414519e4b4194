"""Killed runs, damaged caches and concurrent runs: the record equals that of an undisturbed (quiet) run."""

import os
import shutil
import signal
import subprocess
import threading
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from nla.machine.cache import Cache, Journal
from tests import forked
from tests.conftest import TINY, command, figures, only_record

# random starts and many steps, so that the fit of a matrix takes long enough to be interrupted
SLOW = [*TINY, "kernel=phase", "solver.start=random", "solver.steps=250", "solver.tolerance=0"]


@pytest.fixture(scope="module")
def quiet_outputs(tmp_path_factory) -> Path:
    """The output folder of an undisturbed run."""
    outputs = tmp_path_factory.mktemp("quiet")
    finish(outputs)
    return outputs


@pytest.fixture(scope="module")
def quiet(quiet_outputs) -> dict:
    """The figures of the undisturbed run's record."""
    return figures(only_record(quiet_outputs))


def start(outputs: Path) -> BaseProcess:
    return forked.start(command(outputs, *SLOW))


def finish(outputs: Path) -> subprocess.CompletedProcess:
    result = forked.finish(command(outputs, *SLOW))
    assert result.returncode == 0, result.stderr
    return result


MOMENTS = {
    "in the dense evaluation": lambda out: any(out.glob("cache/windows/*.jsonl")),
    "after two fits": lambda out: len(list(out.glob("cache/fits/*.safetensors"))) >= 2,
    "in the compressed evaluation": lambda out: len(list(out.glob("cache/windows/*.jsonl"))) >= 2,
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_run_killed_at_any_moment_goes_on_to_the_same_record(quiet, tmp_path, moment):
    process = start(tmp_path)
    while process.is_alive() and not MOMENTS[moment](tmp_path):
        time.sleep(0.01)
    reached = MOMENTS[moment](tmp_path)
    process.kill()
    process.join()
    assert reached and process.exitcode == -signal.SIGKILL
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/fits/*.safetensors")}
    finish(tmp_path)
    assert figures(only_record(tmp_path)) == quiet
    assert all(path.stat().st_mtime_ns == then for path, then in kept.items())  # no matrix was fitted twice


def damage(path: Path, how: str) -> None:
    data = bytearray(path.read_bytes())
    if how == "flipped":
        data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data[: len(data) // 2]) if how == "cut" else b"" if how == "emptied" else bytes(data))


@pytest.mark.parametrize("how", ["flipped", "cut", "emptied"])
def test_damaged_cache_files_are_named_and_made_again(quiet, quiet_outputs, tmp_path, how):
    shutil.copytree(quiet_outputs, tmp_path, dirs_exist_ok=True)
    next(tmp_path.glob("runs/*/record.json")).unlink()
    damaged = [sorted(tmp_path.glob(f"cache/{pattern}"))[0] for pattern in ("fits/*", "windows/*", "inventories/*")]
    for path in damaged:
        damage(path, how)
    result = finish(tmp_path)
    for path in damaged:
        assert f"{path} is damaged" in result.stdout or (how, path.suffix) == ("emptied", ".jsonl")
    assert figures(only_record(tmp_path)) == quiet


def test_two_concurrent_runs_with_one_cache_give_the_same_record(quiet, tmp_path):
    first, second = start(tmp_path), start(tmp_path)
    first.join()
    second.join()
    assert first.exitcode == second.exitcode == 0
    assert figures(only_record(tmp_path)) == quiet


def test_a_journal_skips_an_incomplete_line(tmp_path):
    journal = Journal(tmp_path / "parts.jsonl")
    journal.append(0, {"nll": 1.5})
    with journal.path.open("a") as file:
        file.write('{"part": 1, "resu')
    journal.append(2, {"nll": float("inf")})
    assert journal.read() == {0: {"nll": 1.5}, 2: {"nll": float("inf")}}


def test_a_lock_keeps_others_out_until_its_holder_dies(tmp_path, caplog):
    caplog.set_level("INFO")
    cache, (reader, writer) = Cache(tmp_path), os.pipe()
    child = os.fork()
    if child == 0:
        try:
            with cache.lock("kind", "key"):
                os.write(writer, b"locked")
                signal.pause()
        finally:
            os._exit(1)
    assert os.read(reader, 6) == b"locked"
    threading.Timer(0.1, os.kill, (child, signal.SIGKILL)).start()
    with cache.lock("kind", "key"):
        assert f"waiting for another process that works on {tmp_path}/locks/kind-key" in caplog.text
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
