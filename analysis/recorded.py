"""One figure from the records of runs: which runs, which figure of a run, and what is made of several (analysis/claims.yaml)."""

import itertools
import re
import shlex
import statistics
from collections.abc import Callable, Iterable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from analysis.settings import typed_settings
from nla.harness.fits_table import FitRecord
from nla.harness.record import RunRecord

USUAL = {  # the settings of a run whose command line does not name them
    "model": "smollm2_135m", "method": "nla", "kernel": "piecewise", "ratio": "0.7", "select": "layers",
    "task": "language_modelling", "data": "sotu", "seed": "0", "budget": "uniform", "schedule": "cubic",
}  # fmt: skip
AGGREGATES: dict[str, Callable[[list[float]], float]] = {
    "mean": statistics.fmean, "std": statistics.stdev, "min": min, "max": max, "sum": sum, "median": statistics.median, "count": len,
    "first": lambda values: values[0], "last": lambda values: values[-1], "below 1": lambda values: sum(v < 1 for v in values),
}  # fmt: skip
Aggregate = Literal["mean", "std", "min", "max", "sum", "median", "count", "first", "last", "below 1"]
Run = tuple[dict[str, str], RunRecord]  # the settings as typed, and the record


class NoRecord(Exception):
    """No run has these settings, several have, or the run does not have the figure. The message says which."""


class Figure(BaseModel):
    """A figure from records.

    Attributes:
        run: settings as typed behind `python run.py`; a setting that is not named has the default of conf/. Values with commas
            are several runs. Settings of an experiment are written out. A list is joined.
        figure: a dotted path in record.json; or `fits.` or `steps.` and a column: a value per matrix, or per step that has one.
        over: what is made of the values of a column: the mean of all matrices, unless it says something else.
        matrices: a regular expression; only matrices whose names have it count.
        to: the figure is divided by this one: another figure of the same run, or a Figure of its own. Columns of matrices are
            divided matrix by matrix.
        of: what is made of the figures of several runs. Without it, there must be one run.
        format: as in Python, and the unit: `.1f`, `,.0f`, `.1f M`, `.0f %`.
    """

    model_config = ConfigDict(extra="forbid")
    run: str | list[str] = ""
    figure: str
    over: Aggregate = "mean"
    matrices: str = ""
    to: "str | Figure | None" = None
    of: Aggregate | None = None
    format: str = "g"


UNITS = {"": 1.0, "k": 1e3, "M": 1e6, "G": 1e9, "MB": 1e6, "GB": 1e9, "TFLOP": 1e12, "%": 1e-2}


def formatted(figure: Figure, runs: list[Run]) -> str:
    """The figure with its unit, as it stands in a text.

    Args:
        runs: (typed settings, record) of every run, see `described`.

    Raises:
        NoRecord: a run or its figure is missing, or a run is ambiguous.
    """
    digits, _, unit = figure.format.partition(" ")
    return f"{value(figure, runs) / UNITS[unit]:{digits}}" + f" {unit}" * bool(unit)


def described(records: Iterable[RunRecord]) -> list[Run]:
    """(settings as typed, record) of every run."""
    return [(typed_settings(record), record) for record in records]


def value(figure: Figure, runs: list[Run]) -> float:
    found = [of_run(figure, record) for record in matching(figure.run, runs)]
    if figure.of is None and len(found) != 1:
        raise NoRecord(f"{len(found)} runs, and `of` does not say what to make of them")
    number = AGGREGATES[figure.of](found) if figure.of else found[0]
    return number / value(figure.to, runs) if isinstance(figure.to, Figure) else number


def matching(run: str | list[str], runs: list[Run]) -> list[RunRecord]:
    """The one record of every combination of these settings."""
    found = []
    for settings in combinations(run if isinstance(run, str) else " ".join(run)):
        same = [record for typed, record in runs if is_run(settings, typed)]
        if len(same) != 1:
            raise NoRecord(f"{len(same) or 'no'} runs with {' '.join(f'{k}={v}' for k, v in settings.items()) or 'the defaults'}")
        found += same
    return found


def combinations(run: str) -> list[dict[str, str]]:
    """The settings of every run of a sweep such as `method=svd,asvd ratio=0.5`. Of a key that comes twice, the last counts."""
    named = dict(pair.split("=", 1) for pair in shlex.split(run))
    return [dict(zip(named, values, strict=True)) for values in itertools.product(*(v.split(",") for v in named.values()))]


def is_run(settings: dict[str, str], typed: dict[str, str]) -> bool:
    """Whether a run has these settings, and the default of all others. It must have all that are named."""
    asked = USUAL | settings
    return settings.keys() <= typed.keys() and all(asked.get(key) == value for key, value in typed.items())


def of_run(figure: Figure, record: RunRecord) -> float:
    """The figure of one run."""
    divided_by = figure.to if isinstance(figure.to, str) else None
    if not figure.figure.startswith(("fits.", "steps.")):
        number = at_path(record, figure.figure)
        return number / at_path(record, divided_by) if divided_by else number
    values = column(figure.figure, record, figure.matrices)
    if divided_by:
        values = [a / b for a, b in zip(values, column(divided_by, record, figure.matrices), strict=True)]
    if not values:
        raise NoRecord(f"{record.name} has no {figure.figure}")
    return AGGREGATES[figure.over](values)


def column(name: str, record: RunRecord, matrices: str) -> list[float]:
    """The values of a column of the run's matrices, or of its steps, without empty cells."""
    table, _, key = name.partition(".")
    if table == "steps":
        return [row[key] for row in record.history if row.get(key) is not None]
    rows: list[FitRecord] = [fit for fit in record.fits if re.search(matrices, fit.name)]
    return [number for number in (getattr(fit, key) for fit in rows) if number is not None]


def at_path(record: RunRecord, path: str) -> float:
    """The number at a dotted path of record.json."""
    found: Any = record
    for part in path.split("."):
        found = found.get(part) if isinstance(found, dict) else getattr(found, part, None)
    if not isinstance(found, int | float):
        raise NoRecord(f"{record.name} has no {path}")
    return found
