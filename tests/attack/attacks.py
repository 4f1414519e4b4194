"""The rule that every refusal keeps."""

import re
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nla.harness.settings import check_settings
from nla.machine.errors import NonFiniteError, UserError
from nla.pipeline import run
from tests.conftest import configuration

SECONDS, WAIT = 5, 20
QUICK = ["track=none", "method=svd", "ratio=0.5", "dtype=float32"]
TEXT = [*QUICK, "task.window=64", "task.max_windows=2"]


@contextmanager
def in_time() -> Iterator[None]:
    """Context that fails if it takes more than SECONDS of processor time, or waits for ever, for example for a pipe."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"no answer in {WAIT} s")

    before, begun = signal.signal(signal.SIGALRM, stop), time.process_time()
    signal.alarm(WAIT)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert time.process_time() - begun < SECONDS


def refusal(work: Callable[[], object]) -> str:
    """The message with which `work` refuses. It is one line, and comes in time as an error that users see in one line."""
    with in_time():
        try:
            work()
        except (UserError, NonFiniteError) as error:
            said = str(error)
        else:
            raise AssertionError("the request was not refused")
    assert said and "\n" not in said and "Traceback" not in said, said
    return said


def last(*arguments: str) -> list[str]:
    """The arguments without those that a later one of the same setting replaces."""
    return list({argument.lstrip("~+").partition("=")[0]: argument for argument in arguments}.values())


def attack(outputs: Path, expected: str, *arguments: str) -> str:
    """Run the request, which must be refused with words that fit `expected`, and must leave no run behind."""
    said = refusal(lambda: run(check_settings(configuration(*last(f"outputs_dir={outputs}", *arguments)))))
    assert re.search(expected, said), said
    assert not (outputs / "runs").exists(), list((outputs / "runs").rglob("*"))
    return said
