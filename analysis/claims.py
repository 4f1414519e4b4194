"""`python -m analysis.claims`: whether the figures of README.md and FINDINGS.md are those of the records.

analysis/claims.yaml says from which runs or tables each figure is. Every other number in the two texts must be in its list of
numbers that are not measured, or that have no record. A command in the section of a figure makes each of its runs and tables.
"""

import re
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel, ConfigDict, model_validator

from analysis.benchmarks.table import read_tables
from analysis.commands import not_made
from analysis.composed import ROOT
from analysis.recorded import Cell, Figure, NoRecordError, Records, described, formatted, printed_unit
from analysis.records import IN_GIT, load_records

YAML = Path(__file__).with_name("claims.yaml")
FILES = ("README.md", "analysis/FINDINGS.md")
NUMBER = r"(?<![\w.,])\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?"
PLACEHOLDER = re.compile(r"\{(\w*)\}")
COMMANDS = re.compile(r"^```\n(?:python|make|class) .*?\n```|^\$ (?:[^\n]*\\\n)*[^\n]*", re.MULTILINE | re.DOTALL)
NO_FIGURES = re.compile(  # settings and code in a sentence, links, numbers of sections and of points
    r"(?<!`)`[^`]+`(?!`)|\]\([^)]*\)|^#+ \d+\.|^\d+\. |\b[Ff]indings? \d+(?: and \d+)?", re.MULTILINE
)
SECTION = re.compile(r"^## (?:(\d+)\. )?.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
REFERENCE = re.compile(r"[Ff]indings? (\d+)(?: and (\d+))?")
Span = tuple[int, int]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Claim(Strict):
    """A fragment of a text, with a placeholder for each of its figures.

    Attributes:
        text: the fragment; a line break or any number of spaces stands for a space.
        values: {placeholder: its Figure, or its Cell if it has a `table`}. A text alone is its `run`, or its `row`.
        usual: what the figures have in common. A figure's `run` or `row` is added to that of `usual`; all else replaces it. A
            Figure under `to` has the same `run`, unless it has its own.
    """

    text: str
    values: dict[str, dict[str, Any] | str]
    usual: dict[str, Any] = {}

    @model_validator(mode="after")
    def check_placeholders(self) -> "Claim":
        if set(PLACEHOLDER.findall(self.text)) != set(self.values):
            raise ValueError(f"the placeholders of {self.text!r} are not those of its values: {', '.join(self.values)}")
        return self

    def figures(self) -> dict[str, Figure | Cell]:
        return {name: self.figure(value) for name, value in self.values.items()}

    def figure(self, value: dict[str, Any] | str) -> Figure | Cell:
        """A value with what is usual."""
        key = "row" if "table" in self.usual or (isinstance(value, dict) and "table" in value) else "run"
        own = value if isinstance(value, dict) else {key: value}
        own = self.usual | own | {key: [*listed(self.usual.get(key, [])), *listed(own.get(key, []))]}
        if isinstance(own.get("to"), dict):
            own["to"] = {"run": own["run"]} | own["to"]
        return Cell.model_validate(own) if key == "row" else Figure.model_validate(own)


class Unclaimed(Strict):
    """Numbers that no record has to give, and why: those of fragments, or of whole sections.

    In a fragment, `{}` stands for a number that a claim covers.
    """

    why: str
    texts: list[str] = []
    sections: list[str] = []

    def places(self, text: str) -> list[Span]:
        """The places of these numbers in a text."""
        found = []
        for match in (match for fragment in self.texts for match in occurrences(fragment, text, {})):
            cuts = [match.start(), *(at for i in range(len(match.groups())) for at in match.span(i + 1)), match.end()]
            found += zip(cuts[::2], cuts[1::2], strict=True)
        for name in self.sections:
            found += [match.span() for match in re.finditer(rf"^## {re.escape(name)}\n.*?(?=^## |\Z)", text, re.M | re.S)]
        return found


class Claims(Strict):
    """The content of claims.yaml: {text: its claims}, and what is not claimed. `shared` has only anchors."""

    shared: Any = None
    claims: dict[str, list[Claim]]
    unclaimed: list[Unclaimed]


@dataclass
class Checked:
    """A claim beside its text: the places of its figures, and what is wrong unless they are those of the records."""

    claim: Claim
    places: list[Span]
    problems: list[str]


def listed(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else value


def read_claims(path: Path = YAML) -> Claims:
    return Claims.model_validate(yaml.load(path.read_text(), getattr(yaml, "CSafeLoader", yaml.SafeLoader)))


def check(claim: Claim, text: str, records: Records) -> Checked:
    """A claim beside a text, which may have the figures of the records, other figures, or no such words."""
    figures, computed, problems = claim.figures(), {}, []
    for name, figure in figures.items():
        try:
            computed[name] = formatted(figure, records)
        except NoRecordError as error:
            problems.append(f"no record: {error}")
    numbers = {name: NUMBER + re.escape(printed_unit(figure)) for name, figure in figures.items()}
    found = occurrences(claim.text, text, {name: re.escape(figure) for name, figure in computed.items()})
    if not found:
        found = occurrences(claim.text, text, numbers)
        names = PLACEHOLDER.findall(claim.text)
        written = [
            (name, " ".join(group.split())) for match in found for name, group in zip(names, match.groups(), strict=True)
        ]
        problems += [
            f"differs: {{{name}}}: the text has {old}, the records {computed[name]}"
            for name, old in written
            if old != computed.get(name, old)
        ]
        problems += [] if found else ["its words are not in the text"]
    places = [match.span(i + 1) for match in found for i in range(len(match.groups()))]
    return Checked(claim, places, list(dict.fromkeys(problems)))


def occurrences(fragment: str, text: str, figures: dict[str, str]) -> list[re.Match]:
    """The occurrences of a fragment in a text. Group i is the i-th placeholder.

    Args:
        figures: {placeholder: regular expression of its figure}. A placeholder that is not among them is any number.
    """
    words = PLACEHOLDER.split(" ".join(fragment.split()))
    parts = [f"({figures.get(part, NUMBER)})" if i % 2 else re.escape(part) for i, part in enumerate(words)]
    spaced = "".join(parts).replace("\\ ", " ").replace(" ", r"\s+")
    return list(re.finditer(rf"(?<![\w.,]){spaced}(?!\w|[.,]\d)", text))


def uncovered(file: str, text: str, claimed: Iterable[Span], lists: Iterable[Unclaimed]) -> list[str]:
    """The lines of a text with a number that is neither claimed nor listed, the number marked by >> <<."""
    known = [*claimed, *(match.span() for match in NO_FIGURES.finditer(text))]
    for block in COMMANDS.finditer(text):  # commands, but not the comments behind them
        known += [line.span() for line in re.compile(r"^[^#\n]*", re.MULTILINE).finditer(text, *block.span())]
    known += [span for listing in lists for span in listing.places(text)]
    lines = []
    for match in re.finditer(NUMBER, text):
        start, end = match.span()
        if not any(a <= start and end <= b for a, b in known):
            left, right = text.rfind("\n", 0, start) + 1, text.find("\n", end)
            line = f"{text[left:start]}>>{text[start:end]}<<{text[end:right]}"
            lines.append(f"{file}:{text.count(chr(10), 0, start) + 1}: {line.strip()}")
    return lines


@dataclass
class Report:
    """All claims of all texts, numbers that nothing covers, and listed fragments and sections that no text has."""

    checked: dict[str, list[Checked]]
    uncovered: list[str]
    stale: list[str]

    def problems(self) -> list[str]:
        """A line for everything that is wrong; empty if the texts agree with the records."""
        claims = [(file, checked) for file, found in self.checked.items() for checked in found]
        wrong = [f"{file}: {checked.claim.text.strip()}: {line}" for file, checked in claims for line in checked.problems]
        wrong += [f"neither claimed nor listed: {line}" for line in self.uncovered]
        return wrong + [f"listed, but in no text: {fragment}" for fragment in self.stale]


def report(claims: Claims, texts: dict[str, str], records: Records) -> Report:
    """All claims beside their texts, given as {file: text}."""
    checked = {file: [check(claim, texts[file], records) for claim in found] for file, found in claims.claims.items()}
    bare: list[str] = []
    for file, text in texts.items():
        bare += uncovered(file, text, [place for c in checked.get(file, []) for place in c.places], claims.unclaimed)
    alone = [(fragment, Unclaimed(why="", texts=[fragment])) for u in claims.unclaimed for fragment in u.texts]
    alone += [(name, Unclaimed(why="", sections=[name])) for u in claims.unclaimed for name in u.sections]
    return Report(checked, bare, [name for name, one in alone if not any(one.places(text) for text in texts.values())])


def without_command(claims: Claims, texts: dict[str, str], records: Records) -> Iterator[str]:
    """A line for every run or table of a claim that no command makes of those beside it. All words must be in the texts."""
    for file, found in claims.claims.items():
        for claim in found:
            place = check(claim, texts[file], records).places[0]
            for missing in not_made(claim.figures().values(), beside(texts[file], place, texts), records):
                yield f"{file}: {claim.text.strip()}: no command beside it makes {missing}"


def beside(text: str, place: Span, texts: dict[str, str]) -> str:
    """The part of the texts that has the commands of a figure: its section, and the sections that this refers to.

    A figure outside the numbered sections may come from any command, also from that of `make demo`.
    """
    numbered = {match[1]: match[0] for match in SECTION.finditer(text) if match[1]}
    number = next((match[1] for match in SECTION.finditer(text) if match.start() <= place[0] < match.end()), None)
    if number is None:
        return "\n".join([*texts.values(), (ROOT / "Makefile").read_text()])
    named = [other for pair in REFERENCE.findall(numbered[number]) for other in pair if other]
    return "\n".join(numbered[key] for key in [number, *named])


def read_texts() -> dict[str, str]:
    return {file: (ROOT / file).read_text() for file in FILES}


def read_records() -> Records:
    """The records in git."""
    return Records(described(load_records([IN_GIT])), read_tables())


def main() -> str:
    """Print every claim with its state. Returns the problems, a line for each."""
    claims, texts, records = read_claims(), read_texts(), read_records()
    found = report(claims, texts, records)
    for file, all_checked in found.checked.items():
        for checked in all_checked:
            state = checked.problems[0].partition(":")[0] if checked.problems else "ok"
            print(f"{state:10} {Path(file).name}: {' '.join(checked.claim.text.split())}")
    return "\n".join(found.problems() or without_command(claims, texts, records))


if __name__ == "__main__":
    sys.exit(main() or None)
