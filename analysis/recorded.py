"""A figure from the records: what is made of the figures of runs, or a cell of the table of a benchmark."""

import itertools
import re
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from analysis.benchmarks.table import Table
from analysis.settings import typed_settings
from nla.harness.record import RunRecord

USUAL = {  # the settings of a run whose command line does not name them
    "model": "smollm2_135m", "method": "nla", "kernel": "piecewise", "ratio": "0.7", "select": "layers",
    "task": "language_modelling", "data": "sotu", "seed": "0", "budget": "uniform", "schedule": "cubic",
}  # fmt: skip
AGGREGATES: dict[str, Callable[[list[float]], float]] = {
    "mean": statistics.fmean, "std": statistics.stdev, "median": statistics.median,
    "min": min, "max": max, "sum": sum, "count": len,
    "first": lambda values: values[0], "last": lambda values: values[-1], "below 1": lambda values: sum(v < 1 for v in values),
}  # fmt: skip
Aggregate = Literal["mean", "std", "min", "max", "sum", "median", "count", "first", "last", "below 1"]
OF_NONE = ("count", "sum", "below 1")  # aggregates that no values have, too
UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "MB": 1e6, "GB": 1e9, "%": 1e-2, "ms": 1e-3, "minutes": 60.0}
Run = tuple[dict[str, str], RunRecord]  # the settings as typed, and the record


@dataclass
class Records:
    """What figures are computed from.

    Attributes:
        runs: (typed settings, record) of every run, see `described`.
        tables: {file name: table} of benchmarks.
    """

    runs: list[Run]
    tables: dict[str, Table] = field(default_factory=dict)


class NoRecordError(Exception):
    """No run or row has these settings, several have, or it does not have the figure. The message says which."""


class Printed(BaseModel):
    """How a figure is printed.

    Attributes:
        format: as in Python, and the unit: `.1f`, `,.0f`, `.1f M`, `.0f %`. A unit in brackets is not printed: `.1f (%)`.
    """

    model_config = ConfigDict(extra="forbid")
    format: str = Field("g", pattern=rf"^[,.\dfg]+( \(?({'|'.join(UNITS)})\)?)?$")


class Cell(Printed):
    """A figure from the table of a benchmark.

    Attributes:
        table: file name in analysis/records/benchmarks.
        row: cells of one row, as they stand in the file: `kernel=phase tokens=1`. A list is joined.
        figure: a column.
    """

    table: str
    row: str | list[str] = ""
    figure: str


class Figure(Printed):
    """A figure from the records of runs.

    Attributes:
        run: settings as typed behind `python run.py`; a setting that is not named has the default of conf/. Values with commas
            are several runs. Settings of an experiment are written out. A list is joined.
        figure: a path in record.json, or several that are added (`a + b`); or `fits.` or `steps.` and a column: a value per
            matrix, or per step that has one.
        over: what is made of the values of a column.
        where: {column: regular expression} of the matrices that count; all, if it is empty.
        to: the figure is divided by this one: another figure of the same run, or a Figure of its own. Columns of matrices are
            divided matrix by matrix.
        of: what is made of the figures of several runs. Without it, there must be one run.
    """

    run: str | list[str] = ""
    figure: str
    over: Aggregate = "mean"
    where: dict[str, str] = {}
    to: "str | Figure | None" = None
    of: Aggregate | None = None

    @property
    def settings(self) -> str:
        """`run` as one text."""
        return joined(self.run)


def joined(parts: str | list[str]) -> str:
    return parts if isinstance(parts, str) else " ".join(parts)


def formatted(figure: Figure | Cell, records: Records) -> str:
    """The figure with its unit, as it stands in a text.

    Raises:
        NoRecordError: a run, a row or its figure is missing, or a run or a row is ambiguous.
    """
    digits, _, unit = figure.format.partition(" ")
    number = value(figure, records.runs) if isinstance(figure, Figure) else in_table(figure, records.tables)
    return f"{number / UNITS[unit.strip('()')]:{digits}}{printed_unit(figure)}"


def printed_unit(figure: Printed) -> str:
    """A space and the unit that is printed behind a figure, or nothing."""
    unit = figure.format.partition(" ")[2]
    return f" {unit}" if unit and not unit.startswith("(") else ""


def described(records: Iterable[RunRecord]) -> list[Run]:
    """(settings as typed, record) of every run."""
    return [(typed_settings(record), record) for record in records]


def value(figure: Figure, runs: list[Run]) -> float:
    found = [of_run(figure, record) for record in matching(figure.settings, runs)]
    if figure.of is None and len(found) != 1:
        raise NoRecordError(f"{len(found)} runs, and `of` does not say what to make of them")
    number = AGGREGATES[figure.of](found) if figure.of else found[0]
    return number / value(figure.to, runs) if isinstance(figure.to, Figure) else number


def in_table(cell: Cell, tables: dict[str, Table]) -> float:
    """The number in a cell."""
    if cell.table not in tables:
        raise NoRecordError(f"no table {cell.table}; there are {', '.join(tables) or 'none'}")
    row = matching_row(typed_pairs(joined(cell.row)), tables[cell.table].rows, cell.table)
    try:
        return float(row[cell.figure])
    except (KeyError, ValueError) as error:
        raise NoRecordError(f"{cell.table} has no number in column {cell.figure} of this row") from error


def matching_row(asked: dict[str, str], rows: list[dict[str, str]], table: str) -> dict[str, str]:
    """The one row with these cells."""
    other = [{key: row.get(key, "no such column") for key in asked if row.get(key) != asked[key]} for row in rows]
    same = [row for row, different in zip(rows, other, strict=True) if not different]
    named = words(asked) or "any cells"
    if not same:
        near = min(other, key=len, default={})
        raise NoRecordError(f"no row of {table} with {named}; the nearest has {words(near)}")
    if len(same) > 1:
        unlike = ", ".join(key for key in same[0] if same[0][key] != same[1][key]) or "nothing"
        raise NoRecordError(f"{len(same)} rows of {table} with {named}; the first two differ in {unlike}")
    return same[0]


def matching(run: str, runs: list[Run]) -> list[RunRecord]:
    """The one record of every combination of these settings."""
    found = []
    for settings in combinations(run):
        same = [record for typed, record in runs if not differences(settings, typed)]
        if len(same) != 1:
            asked = words(settings) or "the defaults"
            near = min((differences(settings, typed) for typed, _ in runs), key=len, default={})
            raise NoRecordError(
                f"{len(same)} runs with {asked}" if same else f"no run with {asked}; the nearest has {words(near)}"
            )
        found += same
    return found


def runs_of(figure: Figure) -> list[str]:
    """The settings of all runs that a figure is computed from, as typed."""
    return [figure.settings] + (runs_of(figure.to) if isinstance(figure.to, Figure) else [])


def words(settings: dict[str, str]) -> str:
    return " ".join(f"{key}={value}" for key, value in settings.items())


def typed_pairs(text: str) -> dict[str, str]:
    """{name: value} of `name=value name=value`. Of a name that comes twice, the last counts."""
    return dict(pair.split("=", 1) for pair in text.split())


def combinations(run: str) -> list[dict[str, str]]:
    """The settings of every run of a sweep such as `method=svd,asvd ratio=0.5`. Of a key that comes twice, the last counts."""
    named = typed_pairs(run)
    return [dict(zip(named, values, strict=True)) for values in itertools.product(*(v.split(",") for v in named.values()))]


def differences(settings: dict[str, str], typed: dict[str, str]) -> dict[str, str]:
    """What a run has instead of these settings, and instead of the default of all others; empty if it is a run with them.

    The value `null` is the default too, so that a sweep may have it beside others.
    """
    asked = USUAL | settings
    return {key: typed.get(key, "null") for key in settings | typed if asked.get(key, "null") != typed.get(key, "null")}


def of_run(figure: Figure, record: RunRecord) -> float:
    """The figure of one run."""
    divided_by = figure.to if isinstance(figure.to, str) else None
    if not figure.figure.startswith(("fits.", "steps.")):
        terms = figure.figure.replace(" - ", " + -").split(" + ")
        number = sum(-at_path(record, path[1:]) if path.startswith("-") else at_path(record, path) for path in terms)
        return number / at_path(record, divided_by) if divided_by else number
    values = column(figure.figure, record, figure.where)
    if divided_by:
        values = [a / b for a, b in zip(values, column(divided_by, record, figure.where), strict=True)]
    if not values and not (figure.where and figure.over in OF_NONE):
        raise NoRecordError(f"{record.name} has no {figure.figure}" + (f" where {figure.where}" if figure.where else ""))
    return AGGREGATES[figure.over](values)


def column(name: str, record: RunRecord, where: dict[str, str]) -> list[float]:
    """The values of a column of the run's matrices, or of its steps, without empty cells."""
    table, _, key = name.partition(".")
    if table == "steps":
        return [row[key] for row in record.history if row.get(key) is not None]
    rows = [fit for fit in record.fits if all(re.search(regex, getattr(fit, other)) for other, regex in where.items())]
    return [number for number in (getattr(fit, key) for fit in rows) if number is not None]


def at_path(record: RunRecord, path: str) -> float:
    """The number at a dotted path of record.json. Names of data may have dots too."""
    found: Any = record
    rest = path
    while rest:
        inner = found if isinstance(found, dict) else getattr(found, "__dict__", {})
        key = next((key for key in inner if f"{rest}.".startswith(f"{key}.")), None)
        if key is None:
            break
        found, rest = inner[key], rest[len(key) + 1 :]
    if rest or not isinstance(found, int | float):
        raise NoRecordError(f"{record.name} has no {path}")
    return found
