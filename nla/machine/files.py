"""Files: errors of the file system in words, writes that are never incomplete, locks and digests."""

import errno
import fcntl
import hashlib
import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nla.machine.errors import UserError

log = logging.getLogger(__name__)

SPACE = "make space there and type the same command again, which continues from here"
PERMISSION = "allow it, or choose a folder that may be written: outputs_dir=FOLDER or cache_dir=FOLDER"
PLACE = "look at what is there and move it away, or choose another folder: outputs_dir=FOLDER or cache_dir=FOLDER"
HARDWARE = "look at the disk, and type the same command again"
REMEDIES = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), SPACE)
REMEDIES |= dict.fromkeys((errno.EROFS, errno.EACCES, errno.EPERM), PERMISSION)
REMEDIES |= dict.fromkeys((errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY), PLACE)
REMEDIES |= dict.fromkeys((errno.ELOOP, errno.ENAMETOOLONG, errno.ENXIO), PLACE)
REMEDIES |= dict.fromkeys((errno.EIO, errno.ESTALE), HARDWARE)

RESERVE = 64 * 1024  # bytes: more than the record and the table of fits of a run

writing = threading.RLock()  # held while this process has a draft, so that it can end without leaving one


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Context in which an error of the file system becomes a sentence with the file and a remedy.

    Args:
        path: named if the system does not say which file it is, as when a disk is full.

    Raises:
        UserError: instead of an error of the file system.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = number_of(error)
        if number not in REMEDIES:
            raise
        named = getattr(error, "filename", None) or path
        raise UserError(f"{named}: {os.strerror(number)}; {REMEDIES[number]}") from error


def number_of(error: Exception) -> int:
    """The system's number of an error, or 0. Libraries in Rust have it in their text: `... (os error 28)`."""
    if isinstance(error, OSError):
        return error.errno or 0
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else 0


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is never incomplete, even if the process is killed or another process writes it too."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    with naming(path), writing:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            draft.write_bytes(data)
            draft.replace(path)
        except BaseException as error:
            draft.unlink(missing_ok=True)
            if isinstance(error, OSError):
                error.filename = str(path)  # the draft is gone
            raise


@contextmanager
def reserved(path: Path) -> Iterator[None]:
    """Context that keeps some space on the disk. It is free again behind the context, for the record of a failed run."""
    write_atomically(path, os.urandom(RESERVE))
    try:
        yield
    finally:
        remove(path)


def append_line(path: Path, line: str) -> None:
    """Add a line to a file. A killed process loses at most this line."""
    with naming(path), path.open("a") as file:
        file.write(f"{line}\n")


def remove(path: Path) -> None:
    """Remove what is at a path: a file, a link or a whole directory. Nothing there is no error."""
    with naming(path):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Context that holds an advisory lock on a file, after waiting for other processes."""
    with naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that works on %s", path)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def version_of(path: Path) -> list[int]:
    """Numbers that change with a file's contents: size, inode and times. A program can set all but the last one, ctime."""
    stat = path.stat()
    return [stat.st_size, stat.st_ino, stat.st_mtime_ns, stat.st_ctime_ns]


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
