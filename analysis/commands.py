"""The runs, and the tables of benchmarks, that the commands in a text make."""

import re
import shlex
from collections.abc import Collection, Iterator
from functools import cache
from itertools import product
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from analysis.composed import composed, sweep
from analysis.experiments import as_recorded, compared, same_kind
from analysis.recorded import Cell, Figure, Records, matching, runs_of
from nla.harness.record import RunRecord

COMMAND = re.compile(r"python run\.py((?:\\\n|[^\n`#])*)")
BENCHMARK = re.compile(r"python -m analysis\.benchmarks\.\w+(?:\\\n|[^\n`#])*")
PLAIN = ("ratio", "bits", "seed")  # no other setting depends on these, so that runs of all their values are composed once


def not_made(figures: Collection[Figure | Cell], text: str, records: Records) -> Iterator[str]:
    """The runs and the tables of figures that no command in a text makes, each by its name and its settings."""
    made, measured = commanded(text), benchmarks(text)
    for asked in sorted({run for figure in figures if isinstance(figure, Figure) for run in runs_of(figure)}):
        for record in matching(asked, records.runs):
            if not any(makes(settings, record) for settings in made):
                yield f"{record.name} ({asked})"
    for name in sorted({figure.table for figure in figures if isinstance(figure, Cell)}):
        command = records.tables[name].made["command"]
        if set(command.split()) not in measured:
            yield f"{name} ({command})"


def commanded(text: str) -> list[dict[str, Any]]:
    """The settings of every run of every `python run.py` in a text."""
    words = [shlex.split(match[1].replace("\\\n", " ")) for match in COMMAND.finditer(text)]
    return [settings for overrides in words for settings in made_by(*(word for word in overrides if word != "-m"))]


def benchmarks(text: str) -> list[set[str]]:
    """The words of every `python -m analysis.benchmarks.NAME` in a text, without `table=`, which changes no figure."""
    found = [shlex.split(match[0].replace("\\\n", " ")) for match in BENCHMARK.finditer(text)]
    return [{word for word in command if not word.startswith("table=")} for command in found]


@cache
def made_by(*overrides: str) -> list[dict[str, Any]]:
    """The settings of every run of a command, which may be a sweep."""
    asked = swept(overrides)
    plain = {key: asked.pop(key) for key in PLAIN if key in asked}
    found = []
    for row in product(*asked.values()):
        settings = composed(*(f"{key}={value}" for key, value in zip(asked, row, strict=True)))
        if "bits" in plain:  # which take the place of the ratio
            settings = settings | {"ratio": None}
        for own in product(*plain.values()):
            numbers = (None if value == "null" else float(value) for value in own)
            found.append(settings | dict(zip(plain, numbers, strict=True)))
    return found


def swept(overrides: tuple[str, ...]) -> dict[str, list[str]]:
    """{setting: its values} of a command, with the sweep of its experiment."""
    asked = dict(pairs(overrides))
    return sweep(asked["experiment"][0]) | asked if "experiment" in asked else asked


def pairs(overrides: tuple[str, ...]) -> Iterator[tuple[str, list[str]]]:
    """(setting, its values) of overrides such as `ratio=0.5,0.7`."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        values = override.sweep_string_iterator() if override.is_sweep_override() else [override.get_value_element_as_str()]
        yield override.key_or_group, list(values)


def makes(settings: dict[str, Any], record: RunRecord) -> bool:
    """Whether a run with these settings gives this record."""
    config, wanted, found = record.config, compared(as_recorded(settings, record.config)), compared(record.config)
    if not any(fit.steps for fit in record.fits):  # a number of steps that none of them took has no effect
        wanted.pop("method.solver.steps", None)
        found.pop("method.solver.steps", None)
    numbers = all(settings.get(key) == config.get(key) for key in PLAIN)
    return numbers and same_kind(settings, config) and wanted == found
