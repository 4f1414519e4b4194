"""Sentences of the terminal about a run's continuations, fits, refinement and retraining. Lines have at most 80 columns."""

import re
import textwrap
from collections import Counter
from statistics import median

from nla.harness.record import RefineRecord, RunRecord
from nla.solvers.base import REPAIRS, Status


def told_of_continuations(record: RunRecord) -> str:
    """The prompt, and what each model wrote after it, without its line breaks."""
    lines = ["", textwrap.fill(f'"{record.config["prompt"]} ..."', 80)]
    for stage, text in record.continuations.items():
        shown = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in " ".join(text.split()))
        lines.append(textwrap.fill(f"{stage:<12}{shown or '(nothing)'}", 80, subsequent_indent=12 * " "))
    return "\n".join(lines)


def told_of_endings(record: RunRecord) -> str:
    """How many fits ended in which way and how many needed a repair, such as `ended: 11 optimal, 3 converged`."""
    statuses = [re.sub(r"[+=]\S+", "", fit.status).split() or ["unknown"] for fit in record.fits]
    endings = Counter(code for code, *_ in statuses)
    repairs = Counter(name for _, *names in statuses for name in names)
    hints = {Status.STEP_LIMIT.code: " (solver.steps=... goes on)"}
    line = "ended: " + ", ".join(f"{count} {code}{hints.get(code, '')}" for code, count in endings.most_common())
    if repairs:
        line += "; repaired: " + ", ".join(f"{count} {REPAIRS.get(name, name)}" for name, count in repairs.most_common())
    return textwrap.fill(line, 80, subsequent_indent=8 * " ")


def told_of_refinement(r: RefineRecord) -> str:
    """How much refinement lowered the error of the blocks' outputs, and its cost."""
    return (
        f"refinement: mean error of {r.blocks} blocks' outputs {r.error_before:.4f} -> {r.error_after:.4f};\n"
        f"        {r.steps:,} steps in {r.seconds:,.0f} s"
    )


def told_of_retraining(record: RunRecord) -> str:
    """The cost of retraining, and the fraction of parameters that the matrices keep."""
    r, left = record.retraining, [fit.kept_fraction for fit in record.fits]
    assert r is not None
    what = f"{r.tokens:,} tokens" if r.tokens else f"{r.samples:,} samples"
    moments = (r.optimiser_bytes + r.importance_bytes) / r.dense_optimiser_bytes
    return (
        f"retraining: {r.steps:,} steps, {what} in {r.seconds:,.0f} s; optimiser and importance\n"
        f"        {moments:.2f} of what AdamW keeps of the dense model;\n"
        f"        matrices keep {100 * min(left):.1f} to {100 * max(left):.1f} % (median {100 * median(left):.1f} %)"
    )
