"""The figures by which tables show a task."""

from nla.harness.record import RunRecord
from nla.harness.units import number, with_error
from tasks.base import STDERR

COSTS = ("inference_seconds", "inference_peak_bytes", "training_seconds", "training_peak_bytes")  # of forward_cost


def headlines(figures: dict[str, float]) -> list[tuple[str, str]]:
    """Names and figures of what a task is about: seconds and memory, or its first metric, with its standard error if known."""
    names = [name for name in COSTS if name in figures] or list(figures)[:1]
    return [(name, with_error(figures[name], name, figures.get(name + STDERR))) for name in names]


def measured_on(figures: dict[str, float]) -> str:
    """The amount of data behind a metric, such as `8 of 39 windows`."""
    for unit in ("windows", "images", "questions"):
        if unit in figures:
            available = figures.get(f"{unit}_available")
            return f"{figures[unit]:.0f} {f'of {available:.0f} ' if available else ''}{unit}"
    return ""


def stage_headline(record: RunRecord, stage: str) -> str:
    """The first metric of a stage's first task, on its last data set, which is the average if it has several.

    Its standard error is left out: jobs are compared on the same data, on which their difference is known better.
    """
    tasks = list(record.metrics.get(stage, {}).values())
    if not tasks:
        return ""
    name, value = next(iter(list(tasks[0].values())[-1].items()))
    return number(value, name)
