"""The end of a process that is told to stop, by Ctrl-C or by the SIGTERM of Slurm, Kubernetes or a CI.

The signal raises `Stopped` in the main thread. So a run records that it failed, removes its temporary files and ends its
processes, as after any error. `leave` then ends the process.
"""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

from nla.machine.files import writing

WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
GRACE = 20  # seconds that the jobs of a sweep have to record their end; Slurm and Kubernetes kill after 30
RETRY = 0.01  # seconds until an exception that was ignored is raised again
stopping = threading.Event()  # set as soon as a signal has come


class Stopped(KeyboardInterrupt):
    """This process was told to stop. Its text is `interrupted` or `terminated`."""

    def __init__(self, number: int) -> None:
        super().__init__(WORDS[signal.Signals(number)])
        self.exit_code = 128 + number


@contextmanager
def stoppable() -> Iterator[None]:
    """Context in which SIGINT and SIGTERM raise Stopped, once. A signal that the caller of this program ignores stays so."""
    heard = [number for number in WORDS if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, stop) for number in heard}
    try:
        yield
    finally:
        if not stopping.is_set():
            for number, handler in before.items():
                signal.signal(number, handler)


def stop(number: int, frame: FrameType | None) -> NoReturn:
    """Tell the jobs that run side by side in other processes to stop, wait until they have, and raise Stopped."""

    def raise_it(*_: Any) -> NoReturn:
        raise Stopped(number)

    def raise_again(lost: Any) -> None:
        if isinstance(lost.exc_value, Stopped):
            signal.setitimer(signal.ITIMER_REAL, RETRY)

    for known in WORDS:
        signal.signal(known, signal.SIG_IGN)  # the end must not be interrupted again
    signal.signal(signal.SIGALRM, raise_it)
    sys.unraisablehook = raise_again  # Python ignores exceptions in __del__, in weakref callbacks and beside a fork
    stopping.set()
    jobs = multiprocessing.active_children()
    for job in jobs:
        with suppress(ProcessLookupError):
            os.kill(job.pid or 0, number)
    for job in jobs:
        job.join(GRACE)
    raise_it()


def leave(stopped: Stopped) -> NoReturn:
    """End this process at once. Its worker threads, which may be minutes into a matrix, are not waited for."""
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError, ValueError):
            stream.flush()
    with writing:
        os._exit(stopped.exit_code)


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Ask Linux to send this process a signal when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG
