"""Measured columns of the paper's tables: figures of runs of an experiment and of its small twin."""

from collections.abc import Callable, Sequence

import pandas as pd

from analysis.composed import composed
from analysis.experiments import mean_by_row, swept_rows
from analysis.settings import data_names, model_name
from analysis.tables import PAPERS_NAMES
from nla.harness.record import RunRecord

TWINS = {"llama7b": "smollm2", "opt_1_3b": "opt_small", "swin_base": "swin_micro_fashion"}
Records = Sequence[RunRecord]
Figure = Callable[[RunRecord], float | None]


def pair(table: str, model: str) -> tuple[str, str]:
    """Names of a table's experiments for the paper's model and for its small twin."""
    return tuple(name if table == "swin" else f"{table}_{name}" for name in (model, TWINS[model]))  # type: ignore[return-value]


def columns(
    table: str, model: str, records: Records, keys: tuple[str, ...], figure: Figure, fixed: dict[str, str] | None = None
) -> tuple[pd.Series, pd.Series]:
    """A figure of the runs of a table's experiment, and of its twin's. `fixed` are further settings of the first."""
    own, twin = pair(table, model)
    return column(records, own, keys, figure, fixed), column(records, twin, keys, figure)


def column(
    records: Records, experiment: str, keys: tuple[str, ...], figure: Figure, fixed: dict[str, str] | None = None
) -> pd.Series:
    """A figure by row of an experiment, named by its model and data. Rows that nobody ran are empty."""
    found = dict.fromkeys(swept_rows(experiment, keys)) | mean_by_row(records, experiment, keys, figure, fixed)
    index = pd.MultiIndex.from_tuples(found, names=keys) if len(keys) > 1 else pd.Index([row[0] for row in found])
    series = pd.Series(list(found.values()), index, dtype=float, name=column_name(experiment))
    if "method" in keys:
        series = series.rename(lambda method: PAPERS_NAMES.get(method, "NLA"), level="method" if len(keys) > 1 else None)
    return series


def column_name(experiment: str) -> str:
    """Model and data of an experiment, such as `smollm2_135m on sotu`."""
    settings = composed(f"experiment={experiment}")
    return f"{model_name(settings['model'])} on {'+'.join(data_names(settings))}"


def evaluated(stage: str, metric: str) -> Figure:
    """A metric of a stage (`dense`, `compressed` or `retrained`) of runs with one task and one data set."""

    def figure(record: RunRecord) -> float | None:
        sets = [figures for task in record.metrics.get(stage, {}).values() for figures in task.values()]
        return sets[0].get(metric) if len(sets) == 1 else None

    return figure


def average_accuracy(record: RunRecord) -> float | None:
    """The mean accuracy over all tasks of questions, without retraining."""
    tasks = record.metrics.get("compressed", {}).get("commonsense", {})
    return next((figures["acc"] for name, figures in tasks.items() if name.split(".")[-1] == "average"), None)


def million_parameters(when: str) -> Figure:
    """Million parameters of the whole model: `model_before` or `model_after`."""
    return lambda record: getattr(record.parameters, when) / 1e6 if record.parameters else None


def bytes_of(work: str, unit: float) -> Figure:
    """Bytes of the compressed model's weights and of the peak above them, in `inference` or `training`, divided by `unit`."""

    def figure(record: RunRecord) -> float | None:
        parts = [evaluated("compressed", name)(record) for name in ("resident_bytes", f"{work}_peak_bytes")]
        return None if None in parts else sum(filter(None, parts)) / unit

    return figure


def mean_error(record: RunRecord) -> float | None:
    """Mean relative error of the matrices."""
    return sum(fit.relative_error for fit in record.fits) / len(record.fits) if record.fits else None


def mean_to_svd(record: RunRecord) -> float | None:
    """Mean over the matrices of the relative error, divided by that of SVD with as many parameters."""
    return sum(fit.relative_error / fit.svd_error for fit in record.fits) / len(record.fits) if record.fits else None
