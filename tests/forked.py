"""`python ...` as a process of its own without its seconds of imports: forked from a server that has made them."""

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
    """Begin `python arguments`: a process with its own id, variables, files and exit code. Its output is in two files.

    Args:
        arguments: `run.py ...`, `-m module ...` or `-c code`.
        folder: where the files `stdout` and `stderr` are written; without one, nowhere.
    """
    said = [str(folder / name) if folder else os.devnull for name in ("stdout", "stderr")]
    process = SERVER.Process(target=become_python, args=(arguments, os.environ | (environment or {}), said))
    process.start()
    return process


def finish(arguments: list[str], environment: dict[str, str] | None = None) -> subprocess.CompletedProcess:
    """`python arguments` from its start to its end."""
    with TemporaryDirectory() as folder:
        process = start(arguments, environment, Path(folder))
        process.join(300)
        if process.is_alive():
            process.kill()
            raise subprocess.TimeoutExpired(arguments, 300)
        said = [(Path(folder) / name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(arguments, process.exitcode, *said)


def become_python(arguments: list[str], environment: dict[str, str], said: list[str]) -> None:
    """In the forked process: output, folder, variables, arguments and the end of a Python that was started."""
    for descriptor, path in enumerate(said, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.chdir(ROOT)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))
    atexit._clear()  # what the server would do at its end
    try:
        if arguments[0] == "-m":
            sys.argv = arguments[1:]
            runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
        elif arguments[0] == "-c":
            exec(arguments[1], {"__name__": "__main__"})
        else:
            sys.argv = arguments
            runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()
