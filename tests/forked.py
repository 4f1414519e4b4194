"""`python run.py ...` as a process of its own without its seconds of imports: forked from a server that has made them."""

import atexit
import multiprocessing
import os
import runpy
import subprocess
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parent.parent
SERVER = multiprocessing.get_context("forkserver")  # starts with the first process, and ends with the one that uses it
SERVER.set_forkserver_preload(["tests.preloaded"])


def start(arguments: list[str], environment: dict[str, str] | None = None, folder: Path | None = None) -> BaseProcess:
    """Begin a run: a process with its own id, variables, files and exit code. What it says is in two files of the folder."""
    said = [str(folder / name) if folder else os.devnull for name in ("stdout", "stderr")]
    process = SERVER.Process(target=become_run, args=(arguments, os.environ | (environment or {}), said))
    process.start()
    return process


def finish(arguments: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """A run from its start to its end."""
    with TemporaryDirectory() as folder:
        process = start(arguments, environment, Path(folder))
        process.join(300)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(arguments, 300)
        said = [(Path(folder) / name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(arguments, process.exitcode, *said)


def become_run(arguments: list[str], environment: dict[str, str], said: list[str]) -> None:
    """In the forked process: be `python run.py`, for child processes and for native code too."""
    for descriptor, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv = ["run.py", *arguments]
    try:
        runpy.run_path("run.py", run_name="__main__")
    finally:
        atexit._run_exitfuncs()
