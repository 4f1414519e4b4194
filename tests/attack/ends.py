"""How a run ended, judged: exit code, the sentence, the record's status, files that it left, and processes that go on."""

import re
import subprocess
import time
from contextlib import suppress
from pathlib import Path

import psutil

from tests import forked
from tests.conftest import TINY, command, records

QUICK = [*TINY, "method=svd", "ratio=0.5"]
SLOW = [*TINY, "kernel=phase", "solver.start=random", "solver.steps=4000", "solver.tolerance=0", "ratio=0.5"]
MARK = "NLA_ATTACK"  # a variable that every process of an attack has


def files(outputs: Path) -> set[str]:
    return {str(path.relative_to(outputs)) for path in outputs.rglob("*")}


def drafts(outputs: Path) -> list[str]:
    """Files that nobody will need again: drafts, half-made folders, and what several processes were given."""
    given = list(outputs.glob("cache/compressed/*"))
    given += [*outputs.rglob(".making-*"), *outputs.rglob(".reserve")]
    found = [path for path in outputs.rglob(".*") if re.fullmatch(r"\..*\.[0-9a-f]{32}", path.name)]
    return [str(path.relative_to(outputs)) for path in (*given, *found)]


def going_on(mark: str) -> list[str]:
    """Processes that were started with this mark in their environment, and have not ended five seconds later."""

    def found() -> list[str]:
        commands = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):  # it has just ended
                if process.environ().get(MARK) == mark:
                    commands.append(" ".join(process.cmdline()))
        return commands

    for _ in range(50):
        if not found():
            return []
        time.sleep(0.1)
    return found()


def faults(
    end: subprocess.CompletedProcess, outputs: Path, code: int, named: str | None, status: str | None, mark: str = ""
) -> dict:
    """What is wrong with the end of a run; empty if nothing is.

    Args:
        code, named, status: expected exit code, a regular expression found in the sentence (None: no error is told), and status
            (None: no record).
    """
    said = end.stdout + end.stderr
    told = [line for line in said.splitlines() if line.startswith("error: ")]
    found: dict = {}
    if end.returncode != code:
        found["exit code"] = end.returncode
    if "Traceback" in said:
        found["traceback"] = said[said.index("Traceback") :][-600:]
    if named is not None and (len(told) != 1 or not re.search(named, told[0])):
        found["sentence"] = told
    if [record["status"] for record in records(outputs)] != ([] if status is None else [status]):
        found["status"] = [(record["status"], record["error"]) for record in records(outputs)]
    if drafts(outputs):
        found["left"] = drafts(outputs)
    if mark and (left := going_on(mark)):
        found["processes"] = left
    return found


def finish(outputs: Path, *arguments: str) -> subprocess.CompletedProcess:
    return forked.finish(command(outputs, *arguments))
