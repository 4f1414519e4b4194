"""Terminal output: the plan of a run, its result, and the table of a sweep. Lines have at most 80 columns."""

import logging
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

from tabulate import tabulate

from nla.budget.plan import PlannedMatrix
from nla.harness.estimate_fits import estimate
from nla.harness.estimate_retraining import retraining_cost
from nla.harness.latency_table import latency_table
from nla.harness.record import RunRecord, read_record
from nla.harness.request import PreparedRun
from nla.harness.told import told_of_continuations, told_of_endings, told_of_refinement, told_of_retraining
from nla.harness.units import duration, flop, millions, number, with_error
from nla.machine.errors import UserError
from nla.matrix.triplets import triplet_size
from nla.models.base import DTYPES
from tasks.base import STDERR

log = logging.getLogger(__name__)


def announce(prepared: PreparedRun) -> None:
    """Log how many parameters the run is going to remove, or how many bits it keeps."""
    selected = prepared.plan.selected
    fitted, kept = sum(prepared.plan.kept.values()), kept_in_the_end(prepared)
    total = prepared.inventory.parameters
    if kept >= selected or prepared.values["bits"] is not None:  # the number of codes of few bits says nothing
        log.info(
            "keeping %.2f of %d bits for each of %s parameters in %d matrices",
            prepared.plan.kept_bits / selected,
            prepared.target.width,
            millions(selected),
            len(prepared.plan.matrices),
        )
        return
    log.info(
        "removing %.1f %%, keeping %.1f %% of %s parameters in %d matrices;\nwhole model %s -> %s",
        100 * (1 - kept / selected),
        100 * kept / selected,
        millions(selected),
        len(prepared.plan.matrices),
        millions(total),
        millions(total - selected + kept),
    )
    if prepared.budget.tightens:
        log.info(
            "the fits keep %.1f %% (%s); retraining tightens them to that",
            100 * fitted / selected,
            millions(fitted),
        )


def kept_in_the_end(prepared: PreparedRun) -> int:
    """Parameters of the selected matrices after the whole run."""
    sizes = [triplet_size(m.spec.out_features, m.spec.in_features, 1) for m in prepared.plan.matrices]
    kept = sum(prepared.plan.kept.values()) + prepared.retraining.linear_term * sum(sizes)
    return min(kept, prepared.final_numbers) if prepared.budget.tightens else kept


def bytes_in_the_end(prepared: PreparedRun) -> float:
    """Bytes of the whole model when the run ends."""
    plan, size = prepared.plan, DTYPES[prepared.values["dtype"]].itemsize
    kept_bits = plan.kept_bits * kept_in_the_end(prepared) / sum(plan.kept.values())
    return (prepared.inventory.parameters - plan.selected) * size + kept_bits / 8


def show_plan(prepared: PreparedRun) -> None:
    """Log the plan of a dry run: matrices by kind, their sizes and costs, and the expected time on this machine."""
    kinds: dict[tuple, list[PlannedMatrix]] = defaultdict(list)
    for matrix in prepared.plan.matrices:
        kind = re.sub(r".*\.\d+\.", "", matrix.spec.name)
        kinds[kind, matrix.spec.out_features, matrix.spec.in_features, matrix.term.describe()].append(matrix)
    kept = prepared.plan.kept
    rows = [
        [kind, len(same), f"{m}x{n}", terms, millions(len(same) * m * n), millions(sum(kept[e.spec.name] for e in same))]
        for (kind, m, n, terms), same in kinds.items()
    ]
    announce(prepared)
    log.info("\n%s", tabulate(rows, ["matrix", "count", "shape", "terms", "before", "after"], disable_numparse=True))
    size = DTYPES[prepared.values["dtype"]].itemsize
    cost = estimate(prepared)
    step = cost.step / cost.step_rate if cost.step_rate else 0.0
    starts = cost.starts / cost.start_rate if cost.start_rate else 0.0
    before, after = prepared.inventory.parameters * size, bytes_in_the_end(prepared)
    rows = [
        ["bytes of the model", f"{before / 1e9:.2f} GB -> {after / 1e9:.2f} GB ({prepared.values['dtype']})"],
        ["forward, per token", f"{cost.dense_forward / 1e6:.1f} -> {cost.forward / 1e6:.1f} MFLOP in the selected layers"],
    ]
    if cost.starts:
        rows.append(["starts of all fits", f"{flop(cost.starts)}, {duration(starts)} at {flop(cost.start_rate)}/s measured"])
    if cost.steps:
        most = duration(starts + cost.steps * step)
        rows += [
            ["a step of all fits", f"{flop(cost.step)}, {duration(step)} at {flop(cost.step_rate)}/s measured"],
            ["fits altogether", f"{most}, if all {cost.steps} steps run"],
        ]
    if prepared.refinement and prepared.inventory.reads == "text":
        asked = prepared.values["statistics"]
        passes = asked["windows"] * asked["length"] * prepared.refinement.epochs
        rows.append(["refinement", f"{flop(3 * cost.forward * passes)} in the selected layers, for {passes:,} tokens"])
    if prepared.retraining.steps:
        rows += cost_of_retraining(prepared)
    log.info("\n%s\n\nNothing was fitted: dry_run=true.", tabulate(rows, tablefmt="plain"))


def cost_of_retraining(prepared: PreparedRun) -> list[list[str]]:
    """Rows of the plan on retraining: steps, operations, time and memory on the device of `estimate`."""
    cost, device = retraining_cost(prepared), prepared.values["estimate"]
    seconds = cost.flops / (device["flops"] * device["used"])
    processes = prepared.retraining.processes
    devices = f"{processes} x {device['device']}" if processes > 1 else device["device"]
    what = f"{cost.tokens:,} tokens" if cost.tokens else f"{cost.samples:,} images"
    parts = {
        "weights": cost.weights_bytes,
        "gradient": cost.gradient_bytes,
        "AdamW": cost.optimiser_bytes,
        "importance": cost.importance_bytes,
    }
    return [
        ["retraining", f"{prepared.retraining.steps:,} steps, {what}, {flop(cost.flops)}"],
        ["... takes", f"{duration(seconds / processes)} at {100 * device['used']:.0f} % of {devices}"],
        ["... holds", f"{sum(parts.values()) / 1e9:.2f} GB and activations{' in each' if processes > 1 else ''}:"],
        ["", ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items() if size)],
    ]


def show_result(record: RunRecord, folder: Path, note: str = "") -> None:
    """Log the figures of a finished run, and the path of its record."""
    rows = [
        [stage, data, *headline(figures), measured_on(figures)]
        for stage, tasks in record.metrics.items()
        for sets in tasks.values()
        for data, figures in sets.items()
    ]
    log.info("\n%s", tabulate(rows, ["model", "data", "measure", "figure", "of"], disable_numparse=True))
    if latencies := latency_table(record):
        log.info("\n%s", latencies)
    if record.continuations:
        log.info("%s", told_of_continuations(record))
    p, bits = record.parameters, record.bits
    assert p is not None and bits is not None
    log.info("")
    if p.ratio > 0:  # otherwise codes of few bits were stored, and their number says nothing
        log.info(
            "removed %s of the selected parameters (%s -> %s)\n        %s of the model's (%s -> %s)",
            f"{100 * p.ratio:.1f} %",
            millions(p.selected_before),
            millions(p.selected_after),
            f"{100 * p.model_ratio:.1f} %",
            millions(p.model_before),
            millions(p.model_after),
        )
    log.info(
        "kept    %.2f bits per selected weight; %.1f of the model's %.1f MB",
        bits.selected_per_weight,
        bits.model_bytes_after / 1e6,
        bits.model_bytes_before / 1e6,
    )
    if record.refinement or record.retraining:
        log.info("errors of the fits, before training:")
    log.info(
        "mean relative error %.4f; SVD in as many bits %.4f; floor %.4f",
        *(mean(record, key) for key in ("relative_error", "svd_error", "floor")),
    )
    if record.fits[0].weighted_error is not None:
        log.info(
            "weighted by the inputs: %.4f; SVD-LLM in as many bits %.4f;\n        floor %.4f",
            *(mean(record, key) for key in ("weighted_error", "svd_llm_error", "weighted_floor")),
        )
    if record.refinement:
        log.info("%s", told_of_refinement(record.refinement))
    if record.retraining:
        log.info("%s", told_of_retraining(record))
    seconds, flops = sum(f.seconds for f in record.fits), sum(f.flops for f in record.fits)
    log.info(
        "fits: %d matrices, %s in %.0f s of one worker (%s/s)\n%s",
        len(record.fits),
        flop(flops),
        seconds,
        flop(flops / seconds) if seconds else flop(0),
        told_of_endings(record),
    )
    if record.saved:
        log.info("saved:  %s", record.saved)
    log.info("record: %s%s", folder / "record.json", f" ({note})" if note else "")


def show_sweep(outcomes: list[dict[str, Any]]) -> None:
    """Log a table with one line per job, labelled by the settings in which jobs differ, and the reasons of failures."""
    shared = set.intersection(*(set(outcome["overrides"]) for outcome in outcomes)) if len(outcomes) > 1 else set()
    rows, failures = [], []
    for outcome in map(with_record, outcomes):
        label = " ".join(o for o in outcome["overrides"] if o not in shared)
        if "error" in outcome:
            failures.append(f"failed: {label}: {outcome['error']}")
            rows.append([label, "failed", "", "", "", "", ""])
        elif outcome["folder"]:
            record = outcome["record"]
            stages = [stage_headline(record, stage) for stage in ("dense", "compressed", "retrained")]
            errors = [f"{mean(record, key):.4f}" for key in ("relative_error", "svd_error")]
            weighted = record.fits[0].weighted_error is not None
            rows.append([label, *stages, *errors, f"{mean(record, 'weighted_error'):.4f}" if weighted else ""])
    if rows:
        headers = ["sweep", "dense", "compressed", "retrained", "error", "SVD's", "weighted"]
        filled = [i for i in range(len(headers)) if any(row[i] for row in rows)]
        table = [[row[i] for i in filled] for row in rows]
        log.info("\n%s", tabulate(table, [headers[i] for i in filled], disable_numparse=True))
    for failure in failures:
        log.error("%s", failure)


def with_record(outcome: dict[str, Any]) -> dict[str, Any]:
    """The outcome of a job with its record, or with the error of reading it."""
    try:
        return outcome | {"record": read_record(Path(outcome["folder"]))} if outcome.get("folder") else outcome
    except UserError as error:
        return outcome | {"error": str(error)}


def mean(record: RunRecord, figure: str) -> float:
    """Mean of a figure over the fitted matrices."""
    return sum(getattr(fit, figure) for fit in record.fits) / len(record.fits)


def headline(figures: dict[str, float]) -> tuple[str, str]:
    """The name of a task's first metric, and its figure with the standard error if there is one."""
    name, value = next(iter(figures.items()))
    return name, with_error(value, name, figures.get(name + STDERR))


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
