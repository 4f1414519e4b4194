"""Cached folders that are made once and checked by the digests of their files."""

import json
import logging
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

from nla.machine.cache import Cache, file_digest

log = logging.getLogger(__name__)


def sealed_folder(cache: Cache, kind: str, name: str, make: Callable[[Path, Path], None]) -> Path:
    """Path of the folder <cache>/<kind>/<name>. If it is missing or damaged, make(folder, scratch) fills a new one."""
    folder = cache.root / kind / name
    with cache.lock(kind, name):
        if not intact(folder):
            folder.parent.mkdir(parents=True, exist_ok=True)
            prefix = f".making-{name}-"
            for left_behind in folder.parent.glob(f"{prefix}*"):  # left by a killed process
                shutil.rmtree(left_behind)
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
    if not folder.exists():
        return False
    try:
        digests = json.loads((folder / "digests.json").read_text())
        damaged = [name for name, expected in digests.items() if file_digest(folder / name) != expected]
    except (OSError, ValueError) as error:
        damaged = [str(error)]
    if damaged:
        log.warning("cached folder %s is damaged (%s); making it again", folder, ", ".join(damaged))
        shutil.rmtree(folder)
    return not damaged
