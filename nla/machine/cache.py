"""A cache on disk for slow computations. The key of a result is the hash of all that it was computed from."""

import errno
import fcntl
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nla.machine.errors import UserError
from nla.machine.files import exclusive, file_digest, naming, remove, version_of, write_atomically

log = logging.getLogger(__name__)
UNREADABLE = (errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, type and shape."""
    raw = tensor.detach().cpu().contiguous()
    hasher = hashlib.sha256(f"{raw.dtype}{tuple(raw.shape)}".encode())
    hasher.update(raw.flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


class Cache:
    """Entries are files `<root>/<kind>/<key>.*`. A damaged entry is logged, removed and computed again."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def check(self) -> None:
        """Raise UserError if nothing can be stored."""
        with naming(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=self.root).close()

    def load_json(self, kind: str, key: str) -> Any | None:
        """The stored value, or None if it is missing or damaged."""
        path = self.root / kind / f"{key}.json"
        try:
            entry = json.loads(path.read_text())
            if entry["digest"] != digest(entry["value"]):
                raise ValueError("its digest does not match")
            return entry["value"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, OSError) as error:
            discard(path, error)
            return None

    def store_json(self, kind: str, key: str, value: Any) -> None:
        entry = {"digest": digest(value), "value": value}
        write_atomically(self.root / kind / f"{key}.json", json.dumps(entry).encode())

    def remember(self, kind: str, key: str, value: Any) -> None:
        """Store a JSON value that is quickly made again. If it cannot be stored, it is not: what is finished can be shown."""
        try:
            self.store_json(kind, key, value)
        except UserError as error:
            log.debug("%s", error)

    def load_tensors(self, kind: str, key: str) -> tuple[dict[str, Tensor], Any] | None:
        """The stored tensors and the JSON value beside them, or None if they are missing or damaged."""
        from safetensors import SafetensorError, safe_open

        path = self.root / kind / f"{key}.safetensors"
        try:
            with safe_open(path, "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = file.metadata()
            if metadata["digest"] != contents_digest(tensors, metadata["info"]):
                raise ValueError("its digest does not match")
            return tensors, json.loads(metadata["info"])
        except FileNotFoundError:
            return None
        except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
            discard(path, error)
            return None

    def store_tensors(self, kind: str, key: str, tensors: dict[str, Tensor], info: Any) -> None:
        from safetensors.torch import save

        text = json.dumps(info)
        metadata = {"info": text, "digest": contents_digest(tensors, text)}
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        write_atomically(self.root / kind / f"{key}.safetensors", save(whole, metadata))

    def remove(self, kind: str, key: str) -> None:
        """Delete the entries `key` and `key.*`, and incomplete files of killed processes."""
        for pattern in (f"{key}.*", f".{key}.*"):
            for path in (self.root / kind).glob(pattern):
                path.unlink(missing_ok=True)

    def file_digest(self, path: Path) -> str:
        """SHA-256 of a file's bytes. It is cached until the file changes, see `version_of`."""
        key = digest([str(path.resolve()), version_of(path)])
        known = self.load_json("digests", key)
        if known is None:
            known = file_digest(path)
            self.remember("digests", key, known)
        return known

    def journal(self, kind: str, key: str) -> "Journal":
        return Journal(self.root / kind / f"{key}.jsonl")

    @contextmanager
    def lock(self, kind: str, key: str) -> Iterator[None]:
        """Context that one process at a time can enter. The system releases the lock if the process dies."""
        path = self.root / "locks" / f"{kind}-{key}"
        with exclusive(path):
            yield


def discard(path: Path, error: Exception) -> None:
    """Log and remove a damaged entry, or what is in its place. An entry that cannot be read now may be good: it stays."""
    if getattr(error, "errno", None) in UNREADABLE:
        raise error
    log.warning("cache file %s is damaged (%s); making it again", path, error)
    remove(path)


def contents_digest(tensors: dict[str, Tensor], info: str) -> str:
    return digest([info, {name: tensor_digest(tensor) for name, tensor in tensors.items()}])


class Journal:
    """Results of the parts of a computation, one line per part, so that a killed process loses at most one part."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[int, dict]:
        """Results by part number. A damaged line is logged and left out, so that its part is computed again."""
        parts: dict[int, dict] = {}
        try:
            lines = self.path.read_text(errors="replace").splitlines()
        except FileNotFoundError:
            remove(self.path)  # a link to nothing
            return parts
        except OSError as error:
            discard(self.path, error)
            return parts
        for number, line in enumerate(lines, 1):
            try:
                entry = json.loads(line)
                if entry["digest"] != digest([entry["part"], entry["result"]]):
                    raise ValueError("its digest does not match")
                parts[entry["part"]] = entry["result"]
            except (ValueError, KeyError, TypeError) as error:
                log.warning("line %d of cache file %s is damaged (%s); making it again", number, self.path, error)
        return parts

    def append(self, part: int, result: dict) -> None:
        line = json.dumps({"part": part, "result": result, "digest": digest([part, result])}) + "\n"
        with naming(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                if file.tell():  # a killed process may have left an incomplete line
                    file.seek(-1, os.SEEK_END)
                    if file.read(1) != b"\n":
                        file.write(b"\n")
                file.write(line.encode())
