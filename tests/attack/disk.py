"""Disks that fail, for tests that are not root: a full one, and one that may only be read. For a process of its own."""

import builtins
import errno
import io
import os
import sys
from pathlib import Path
from typing import Any

WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT
CHANGES = {"os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.chmod", "os.utime", "os.truncate"}


def run_on(disk: str, folder: Path, arguments: list[str]) -> list[str]:
    """Arguments of a Python that runs `run.py ...` while `folder` is on a disk, such as `read_only()`; for tests.forked."""
    name, _, rest = disk.partition("(")
    code = f"import runpy, sys; from tests.attack import disk; disk.{name}({str(folder)!r}, {rest}"
    return ["-c", f"{code}; sys.argv = {arguments}; runpy.run_path('run.py', run_name='__main__')"]


def full(folder: str, pattern: str, free: int) -> None:
    """When a file whose path contains `pattern` is first written, only `free` more bytes fit on the disk of `folder`.

    As on a real disk, a part is written before a write fails, and what is deleted makes space.
    """
    real, size = io.open, None

    def used() -> int:
        return sum(path.stat().st_size for path in Path(folder).rglob("*") if path.is_file())

    class Limited(io.FileIO):
        def write(self, data: Any) -> int:
            left = len(data) if size is None else size - used()
            if left <= 0:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return super().write(bytes(data)[:left])

    def opened(file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, *others: Any, **named: Any) -> Any:
        nonlocal size
        inside = isinstance(file, str | os.PathLike) and Path(file).is_relative_to(folder)
        if "opener" in named or not inside or not set(mode) & set("wax+"):
            return real(file, mode, buffering, encoding, *others, **named)
        if size is None and pattern in str(file):
            size = used() + free
        raw = Limited(file, mode.replace("b", "").replace("t", ""))
        kept = raw if buffering == 0 else (io.BufferedRandom if "+" in mode else io.BufferedWriter)(raw)
        return kept if "b" in mode else io.TextIOWrapper(kept, encoding or "utf-8")

    io.open = builtins.open = opened


def read_only(folder: str) -> None:
    """From now on, every change in `folder` fails as on a disk that is mounted to be read."""

    def refuse(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "open":
            path, _, flags = arguments
            changes = bool(flags & WRITES)
        else:
            path, changes = next(iter(arguments), None), event in CHANGES
        if changes and isinstance(path, str | os.PathLike) and Path(path).is_relative_to(folder):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))

    sys.addaudithook(refuse)
