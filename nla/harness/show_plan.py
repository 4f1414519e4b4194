"""Terminal output of what a run is going to do. Lines have at most 80 columns."""

import logging
import re
from collections import defaultdict

from tabulate import tabulate

from nla.budget.measured import MeasuredBudget
from nla.budget.plan import PlannedMatrix
from nla.harness.estimate_fits import estimate
from nla.harness.estimate_retraining import retraining_cost
from nla.harness.request import PreparedRun
from nla.harness.sizes import bytes_in_the_end, kept_in_the_end
from nla.harness.units import duration, flop, millions, size
from nla.models.base import DTYPES

log = logging.getLogger(__name__)
TERMS = 3  # the column of the plan whose texts may take several lines


def announce(prepared: PreparedRun) -> None:
    """Log how many parameters the run is going to remove, or how many bits it keeps."""
    selected = prepared.plan.selected
    fitted, kept = sum(prepared.plan.kept.values()), kept_in_the_end(prepared)
    total = prepared.inventory.parameters
    if isinstance(prepared.budget, MeasuredBudget):
        log.info(
            "keeping at most %.2f of %d bits for each of %s parameters in %d matrices;\n"
            "the budget divides them when it has measured the model",
            prepared.target.bits,
            prepared.target.width,
            millions(selected),
            len(prepared.plan.matrices),
        )
        return
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
    header = ["matrix", "count", "shape", "terms", "before", "after"]
    # tabulate makes a column two wider than its name, at least, and puts two spaces between columns
    wide = [max(len(name) + 2, *(len(str(row[i])) for row in rows)) + 2 for i, name in enumerate(header)]
    widths = [80 - sum(wide) + wide[TERMS] if i == TERMS else None for i in range(len(header))]
    log.info("\n%s", tabulate(rows, header, disable_numparse=True, maxcolwidths=widths))
    if isinstance(prepared.budget, MeasuredBudget):
        log.info("These are equal shares; the budget has not measured the model.")
    width = DTYPES[prepared.values["dtype"]].itemsize
    cost = estimate(prepared)
    step = cost.step / cost.step_rate if cost.step_rate else 0.0
    starts = cost.starts / cost.start_rate if cost.start_rate else 0.0
    before, after = prepared.inventory.parameters * width, bytes_in_the_end(prepared)
    forward = f"{cost.dense_forward / 1e6:.1f} -> {cost.forward / 1e6:.1f} MFLOP in the selected layers"
    rows = [
        ["bytes of the model", f"{size(before)} -> {size(after)} ({prepared.values['dtype']})"],
        ["forward, " + ("per token" if prepared.inventory.reads == "text" else "a row each"), forward],
    ]
    if cost.starts:
        rows.append(["starts of all fits", f"{flop(cost.starts)}, {duration(starts)} at {flop(cost.start_rate)}/s measured"])
    if cost.steps:
        most = duration(starts + cost.steps * step)
        rows += [
            ["a step of all fits", f"{flop(cost.step)}, {duration(step)} at {flop(cost.step_rate)}/s measured"],
            ["fits altogether", f"{most}, if all {cost.steps} steps run"],
        ]
    if cost.tokens:
        rows.append(["refinement", f"{flop(cost.refining)} in the selected layers, for {cost.tokens:,} tokens"])
        if cost.refining_rate:
            took = duration(cost.refining / cost.refining_rate)
            rows.append(["... takes", f"{took} at {flop(cost.refining_rate)}/s measured"])
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
        ["... holds", f"{size(sum(parts.values()))} and activations{' in each' if processes > 1 else ''}:"],
        *(["", f"{size(count)} {name}"] for name, count in parts.items() if count),
    ]
