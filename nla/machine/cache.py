"""A cache on disk for slow computations. The key of a result is the hash of all that it was computed from."""

import fcntl
import hashlib
import json
import logging
import os
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

log = logging.getLogger(__name__)


def digest(value: Any) -> str:
    """SHA-256 of a JSON value, independent of the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def tensor_digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes, type and shape."""
    raw = tensor.detach().cpu().contiguous()
    hasher = hashlib.sha256(f"{raw.dtype}{tuple(raw.shape)}".encode())
    hasher.update(raw.flatten().view(torch.uint8).numpy().data)
    return hasher.hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomically(path: Path, data: bytes) -> None:
    """Write a file that is never incomplete, even if the process is killed or another process writes it too."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    draft.write_bytes(data)
    draft.replace(path)


class Cache:
    """Entries are files `<root>/<kind>/<key>.*`. A damaged entry is logged, removed and computed again."""

    def __init__(self, root: Path) -> None:
        self.root = root

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
        except (ValueError, KeyError, TypeError) as error:
            return self._discard(path, error)

    def store_json(self, kind: str, key: str, value: Any) -> None:
        entry = {"digest": digest(value), "value": value}
        write_atomically(self.root / kind / f"{key}.json", json.dumps(entry).encode())

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
            return self._discard(path, error)

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
        """SHA-256 of a file's bytes. It is cached until the file's size, inode or modification time changes."""
        stat = path.stat()
        key = digest([str(path.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino])
        known = self.load_json("digests", key)
        if known is None:
            known = file_digest(path)
            self.store_json("digests", key, known)
        return known

    def journal(self, kind: str, key: str) -> "Journal":
        return Journal(self.root / kind / f"{key}.jsonl")

    @contextmanager
    def lock(self, kind: str, key: str) -> Iterator[None]:
        """Context that one process at a time can enter. The system releases the lock if the process dies."""
        path = self.root / "locks" / f"{kind}-{key}"
        with exclusive(path):
            yield

    @staticmethod
    def _discard(path: Path, error: Exception) -> None:
        log.warning("cache file %s is damaged (%s); making it again", path, error)
        path.unlink(missing_ok=True)


@contextmanager
def exclusive(path: Path) -> Iterator[None]:
    """Context that holds an advisory lock on a file, after waiting for other processes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log.info("waiting for another process that works on %s", path.name)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def contents_digest(tensors: dict[str, Tensor], info: str) -> str:
    return digest([info, {name: tensor_digest(tensor) for name, tensor in tensors.items()}])


class Journal:
    """Results of the parts of a computation, one line per part, so that a killed process loses at most one part."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[int, dict]:
        """Results by part number. A damaged line is logged and left out, so that its part is computed again."""
        parts: dict[int, dict] = {}
        if not self.path.exists():
            return parts
        for number, line in enumerate(self.path.read_text(errors="replace").splitlines(), 1):
            try:
                entry = json.loads(line)
                if entry["digest"] != digest([entry["part"], entry["result"]]):
                    raise ValueError("its digest does not match")
                parts[entry["part"]] = entry["result"]
            except (ValueError, KeyError, TypeError) as error:
                log.warning("line %d of cache file %s is damaged (%s); making it again", number, self.path, error)
        return parts

    def append(self, part: int, result: dict) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        line = json.dumps({"part": part, "result": result, "digest": digest([part, result])}) + "\n"
        with self.path.open("ab+") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            if file.tell():  # a killed process may have left an incomplete line
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":
                    file.write(b"\n")
            file.write(line.encode())
