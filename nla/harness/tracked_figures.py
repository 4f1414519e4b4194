"""The figures that a tracker shows: the summary of a run, the points of its charts, and the rows of its tables."""

import math
from collections.abc import Iterable
from statistics import fmean
from typing import Any

from nla.budget.importance import IMPORTANCE_QUANTILES
from nla.harness.fits_table import FitRecord
from nla.harness.record import RunRecord
from tasks.base import STDERR

Losses = list[tuple[int, float]]  # (step, error)
Rows = list[list[Any]]


def summary(record: RunRecord) -> dict[str, float]:
    """The figures by which runs are compared, as far as they are known.

    error, to_svd, weighted_error, to_svd_llm: means over the matrices, see `point`. `<metric>/<stage>`: the first metric of
    each task, such as perplexity/compressed; `<metric>_stderr/<stage>`: its standard error. ratio: removed fraction. bits: per
    selected weight. bytes_before, bytes: of the model. blocks/before, blocks/after: see RefineRecord. peak_bytes: the largest
    of all stages. seconds: of the whole run.
    """
    points = [point(fit) for fit in record.fits]
    names = dict.fromkeys(name for p in points for name in p)
    figures = {name: fmean(p[name] for p in points if name in p) for name in names}
    for stage, tasks in record.metrics.items():
        for sets in filter(None, tasks.values()):
            measured = list(sets.values())[-1]  # the last set is the average if there are several
            metric = next(iter(measured))
            figures |= {f"{name}/{stage}": measured[name] for name in (metric, metric + STDERR) if name in measured}
    if record.parameters is not None:
        figures["ratio"] = record.parameters.ratio
    if record.bits is not None:
        figures["bits"] = record.bits.selected_per_weight
        figures |= {"bytes_before": record.bits.model_bytes_before, "bytes": record.bits.model_bytes_after}
    if record.refinement is not None:
        figures |= {"blocks/before": record.refinement.error_before, "blocks/after": record.refinement.error_after}
    if record.peak_bytes:
        figures["peak_bytes"] = max(record.peak_bytes.values())
    if record.seconds:
        figures["seconds"] = sum(record.seconds.values())
    return figures


def point(fit: FitRecord) -> dict[str, float]:
    """The relative error of a matrix and its ratio to that of SVD; the same weighted by its inputs, to SVD-LLM, if known."""
    figures = {"error": fit.relative_error, "to_svd": ratio(fit.relative_error, fit.svd_error)}
    if fit.weighted_error is not None and fit.svd_llm_error is not None:
        figures |= {"weighted_error": fit.weighted_error, "to_svd_llm": ratio(fit.weighted_error, fit.svd_llm_error)}
    return figures


def ratio(error: float, other: float) -> float:
    """error / other. It is 1 if both are 0."""
    return error / other if other else math.inf if error else 1.0


def retraining_point(row: dict[str, Any]) -> dict[str, float]:
    """The numbers in a row of the history, without those of single matrices. Quantiles are named `importance/50%`."""
    figures = {name: value for name, value in row.items() if isinstance(value, int | float)}
    return figures | {f"importance/{q:.0%}": x for q, x in zip(IMPORTANCE_QUANTILES, row.get("importance", []), strict=False)}


def largest_errors(curves: dict[str, Losses], fits: Iterable[FitRecord], count: int) -> dict[str, Losses]:
    """The loss curves of the `count` matrices with the largest relative errors, the largest first."""
    worst = sorted((fit for fit in fits if fit.name in curves), key=lambda fit: -fit.relative_error)
    return {fit.name: curves[fit.name] for fit in worst[:count]}


def loss_rows(curves: dict[str, Losses], points: int) -> Rows:
    """Rows (matrix, step, loss) of all curves. A curve of more than `points` losses is thinned evenly; its ends stay."""
    return [[name, step, loss] for name, losses in curves.items() for step, loss in thinned(losses, points)]


def thinned(losses: Losses, points: int) -> Losses:
    """At most `points` of the losses, evenly spaced, with the first and the last."""
    if len(losses) <= points:
        return losses
    return [losses[i * (len(losses) - 1) // (points - 1)] for i in range(points)]


def metric_rows(record: RunRecord) -> Rows:
    """Rows (stage, task, data, metric, value, standard error or None) of all metrics."""
    return [
        [stage, task, data, metric, float(value), figures.get(metric + STDERR)]
        for stage, tasks in record.metrics.items()
        for task, sets in tasks.items()
        for data, figures in sets.items()
        for metric, value in figures.items()
        if not metric.endswith(STDERR)
    ]


def kept_rows(record: RunRecord) -> Rows:
    """Rows (matrix, parameters of the fit, parameters after retraining, kept fraction), or none without retraining."""
    return [[fit.name, fit.fitted, fit.kept, fit.kept_fraction] for fit in record.fits if fit.kept is not None]
