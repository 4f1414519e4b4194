"""Terminal output of what a run, or a sweep of runs, has found. Lines have at most 80 columns."""

import logging
from pathlib import Path
from typing import Any

from tabulate import tabulate

from nla.harness.headlines import headlines, measured_on, stage_headline
from nla.harness.latency_table import latency_table
from nla.harness.record import RunRecord, read_record
from nla.harness.told import told_of_continuations, told_of_endings, told_of_refinement, told_of_retraining
from nla.harness.units import flop, millions
from nla.machine.errors import UserError

log = logging.getLogger(__name__)


def show_result(record: RunRecord, folder: Path, note: str = "") -> None:
    """Log the figures of a finished run, and the path of its record."""
    latencies = latency_table(record)
    rows = [
        [stage, data, name, figure, measured_on(figures)]
        for stage, tasks in record.metrics.items()
        for task, sets in tasks.items()
        for data, figures in sets.items()
        for name, figure in headlines(figures)
        if not (latencies and task == "latency")  # those of the dense model alone were not measured in turns
    ]
    if rows:
        log.info("\n%s", tabulate(rows, ["model", "data", "measure", "figure", "of"], disable_numparse=True))
    if latencies:
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
