"""Cached folders that are made once and checked by the digests of their files."""

import json
import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from nla.machine.cache import Cache
from nla.machine.files import file_digest, naming, remove

log = logging.getLogger(__name__)


def sealed_folder(cache: Cache, kind: str, name: str, make: Callable[[Path, Path], None]) -> Path:
    """Path of the folder <cache>/<kind>/<name>. If it is missing or damaged, make(folder, scratch) fills a new one."""
    folder = cache.root / kind / name
    with naming(folder), cache.lock(kind, name):
        if not intact(folder):
            make_sealed(folder, make)
    return folder


def make_sealed(folder: Path, make: Callable[[Path, Path], None]) -> None:
    """Let make(draft, scratch) fill a draft, seal it, and give it its name. A killed process leaves no folder of this name.

    One process at a time may make a folder: drafts that others left are removed.

    Raises:
        OSError: the folder cannot be written, or it exists and is not empty.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".making-{folder.name}-"
    for left_behind in folder.parent.glob(f"{prefix}{'?' * 8}"):  # left by a killed process; tempfile adds 8 characters
        remove(left_behind)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as scratch:
        draft = Path(scratch) / "made"
        draft.mkdir()
        make(draft, Path(scratch))
        seal(draft)
        draft.replace(folder)


def seal(folder: Path) -> None:
    """Write the digest of every file, also in subfolders, to digests.json, so that intact() notices damage."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    digests = {path.relative_to(folder).as_posix(): file_digest(path) for path in files}
    (folder / "digests.json").write_text(json.dumps(digests, indent=1))


def intact(folder: Path) -> bool:
    """Whether the folder exists and its files have their digests. A damaged folder is logged and removed."""
    if not os.path.lexists(folder):
        return False
    damaged = damage(folder)
    if damaged:
        log.warning("cached folder %s is damaged (%s); making it again", folder, ", ".join(damaged))
        remove(folder)
    return not damaged


def damage(folder: Path) -> list[str]:
    """What is wrong with a sealed folder: the files that are missing or changed, or why its digests cannot be read."""
    try:
        digests = json.loads((folder / "digests.json").read_text())
        return [n for n, known in digests.items() if not (folder / n).is_file() or file_digest(folder / n) != known]
    except (OSError, ValueError, AttributeError) as error:
        return [str(error)]
