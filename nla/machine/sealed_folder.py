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
            folder.parent.mkdir(parents=True, exist_ok=True)
            prefix = f".making-{name}-"
            for left_behind in folder.parent.glob(f"{prefix}*"):  # left by a killed process
                remove(left_behind)
            with tempfile.TemporaryDirectory(dir=folder.parent, prefix=prefix) as scratch:
                draft = Path(scratch) / "made"
                draft.mkdir()
                make(draft, Path(scratch))
                seal(draft)
                draft.replace(folder)
    return folder


def seal(folder: Path) -> None:
    """Write the digest of every file to digests.json, so that intact() notices damage."""
    digests = {path.name: file_digest(path) for path in sorted(folder.iterdir())}
    (folder / "digests.json").write_text(json.dumps(digests, indent=1))


def intact(folder: Path) -> bool:
    """Whether the folder exists and its files have their digests. A damaged folder is logged and removed."""
    if not os.path.lexists(folder):
        return False
    try:
        digests = json.loads((folder / "digests.json").read_text())
        damaged = [name for name, expected in digests.items() if file_digest(folder / name) != expected]
    except (OSError, ValueError, AttributeError) as error:
        damaged = [str(error)]
    if damaged:
        log.warning("cached folder %s is damaged (%s); making it again", folder, ", ".join(damaged))
        remove(folder)
    return not damaged
