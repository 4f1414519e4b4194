"""The rows of the experiments in conf/experiment, and the runs that were made with the settings of a row."""

import itertools
from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import cache
from statistics import fmean
from typing import Any

from hydra.utils import get_class

from analysis.composed import composed, leaves, sweep
from analysis.settings import NOT_TRAINED_BY, data_names, forward_form, model_name, nearest_option, task_names
from nla.harness.record import RunRecord
from nla.kernels.base import TRAINING_RATE

Row = tuple[Any, ...]  # the values of a table's keys, such as (0.5, "svd_llm") for the keys ratio and method
COMPARED = ("ratio", "bits", "dtype", "forward", "select", "method", "budget", "task", "statistics", "refine", "retrain")
# A local copy (path) has the same files. The rest changes how a run computes or times, not what. Seeds are averaged.
IGNORED = NOT_TRAINED_BY - {"steps"} | {"path", "collect", "offload", "seed", "repeats"}


def swept_rows(experiment: str, keys: tuple[str, ...]) -> list[Row]:
    """The rows that an experiment runs, as values of these keys."""
    return list(itertools.product(*(values(experiment, key) for key in keys)))


def mean_by_row(
    records: Iterable[RunRecord],
    experiment: str,
    keys: tuple[str, ...],
    figure: Callable[[RunRecord], float | None],
    fixed: dict[str, str] | None = None,
) -> dict[Row, float]:
    """{row: mean figure over seeds} of the runs that were made with the settings of a row of an experiment.

    Args:
        keys: the settings that tell rows apart: ratio, method, kernel, budget or forward.
        figure: the figure of a run, or None if the run does not have it.
        fixed: further settings of the experiment, such as {data: ptb}.
    """
    found: dict[Row, list[float]] = defaultdict(list)
    for record in records:
        row = row_of(record, experiment, keys, fixed or {})
        value = figure(record) if row else None
        if row and value is not None:
            found[row].append(value)
    return {row: fmean(values) for row, values in found.items()}


def row_of(record: RunRecord, experiment: str, keys: tuple[str, ...], fixed: dict[str, str]) -> Row | None:
    """The row of an experiment that has the settings of this run, or None.

    The row is composed from the experiment, `fixed` and the run's own values of `keys`. All other settings that change a
    figure must be equal. `ratio` may have any value: `experiment=perplexity_llama7b ratio=0.2` makes another row. No other
    setting depends on it, so that rows of all ratios are composed once. The other keys have the values of the sweep.
    """
    usual, of_run = composed(f"experiment={experiment}"), labels(record.config)
    if not same_kind(usual, record.config) or any(of_run[key] != value for key, value in fixed.items()):
        return None
    row = {key: of_run[key] for key in keys}
    if row.get("ratio", 0) is None or any(of_run[key] not in values(experiment, key) for key in keys if key != "ratio"):
        return None
    overrides = [f"{key}={value}" for key, value in (fixed | row).items() if key != "ratio"]
    settings = composed(f"experiment={experiment}", *overrides)
    wanted = as_recorded(settings | {"ratio": row.get("ratio", settings["ratio"])}, record.config)
    return tuple(row.values()) if compared(wanted) == compared(record.config) else None


def same_kind(settings: dict[str, Any], config: dict[str, Any]) -> bool:
    """Whether a run has this model and these tasks, and both or none are retrained."""
    return (
        model_name(config["model"]) == model_name(settings["model"])
        and task_names(config) == task_names(settings)
        and bool(settings["retrain"]["steps"]) == ("retrain" in config)
    )


@cache
def values(experiment: str, key: str) -> list[Any]:
    """The values of a setting in the sweep of an experiment, or the experiment's own value."""
    found = sweep(experiment).get(key) or [labels(composed(f"experiment={experiment}"))[key]]
    return [float(value) for value in found] if key == "ratio" else found


def labels(config: dict[str, Any]) -> dict[str, Any]:
    """The settings that tell rows of tables apart, as typed. `kernel` is None for a method without one."""
    method = config["method"]
    return {
        "ratio": config["ratio"],
        "data": "+".join(data_names(config)),
        "method": nearest_option("method", method)[0],
        "kernel": nearest_option("kernel", method["kernel"])[0] if "kernel" in method else None,
        "budget": nearest_option("budget", config["budget"])[0],
        "forward": forward_form(config),
    }


def as_recorded(settings: dict[str, Any], config: dict[str, Any]) -> dict[str, Any]:
    """Composed settings in the form of a record: one data set per group, and without groups that the run does not use.

    Whether a run has statistics follows from its method and budget, so that the group is kept if the record has it.
    """
    used = {"statistics": "statistics" in config, "retrain": bool(settings["retrain"]["steps"])}
    found = {key: value for key, value in settings.items() if used.get(key, True)}
    for group in (group for group, kept in used.items() if kept):
        data = settings[group]["data"]
        found[group] = settings[group] | {"data": data.get("text") or data["images"]}
    return found


def compared(config: dict[str, Any]) -> dict[str, Any]:
    """{dotted key: value} of the settings of a run that change a figure, except the model's.

    Whoever adds a setting adds it to the records in git too, with what the code did before. Other runs are not found again.
    """
    found = leaves({key: config[key] for key in COMPARED if key in config}, IGNORED)
    if "retrain.lr" in found and found["retrain.lr"] is None:
        kernel = config["method"].get("kernel")
        found["retrain.lr"] = get_class(kernel["_target_"]).training_rate if kernel else TRAINING_RATE
    return found
