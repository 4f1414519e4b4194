"""Figures, drawn from the data frames of `analysis.frames` and from records."""

import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from nla.harness.fits_table import FitRecord

MARKERS = "s^vDPX<>"  # of methods whose names are not ours
PERPLEXITIES = [10, 20, 30, 50, 100, 200, 300, 500, 1000, 2000, 5000, 10000]  # ticks of an axis


def loss_by_layer(fits: pd.DataFrame) -> Figure:
    """Relative error of each matrix by layer: one panel per kind, a line per kernel or method, SVD and floor as references."""
    return by_layer(fits, "relative_error", "svd", "floor", "relative squared error")


def weighted_loss_by_layer(fits: pd.DataFrame) -> Figure:
    """Relative error of each matrix's outputs, as in `loss_by_layer`; the references are SVD-LLM and the weighted floor."""
    return by_layer(fits, "weighted_error", "svd_llm", "weighted_floor", "relative squared error of the outputs")


def by_layer(fits: pd.DataFrame, error: str, rival: str, floor: str, label: str) -> Figure:
    """A figure with one panel per kind of matrix, and in it one line per run.

    Args:
        fits: rows of `fits_frame`, of one model at one ratio.
        error, floor: the columns to draw.
        rival: the method whose error at equal parameters is a reference: its column is <rival>_error.
        label: of the vertical axes.
    """
    kinds, names = list(dict.fromkeys(fits["kind"])), names_of_runs(fits)
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axis, kind in zip(axes, kinds, strict=False):
        of_kind = fits[fits["kind"] == kind].sort_values("layer")
        reference = of_kind.drop_duplicates("layer")
        name = f"{rival.upper().replace('_', '-')}, equal parameters"
        axis.plot(reference["layer"], reference[f"{rival}_error"], "k--", linewidth=1, label=name)
        for signature, run in names.items():
            line = of_kind[of_kind["signature"] == signature]
            if np.allclose(line[error], line[f"{rival}_error"], rtol=0.01):
                continue  # it is the reference
            drawn = axis.plot(line["layer"], line[error], marker=".", markersize=3, linewidth=1, label=run)
            if run.partition(" ")[0] == "piecewise":
                colour = drawn[0].get_color()
                axis.plot(line["layer"], line[floor], ":", color=colour, linewidth=1, label="floor of piecewise")
        axis.set_title(kind, fontsize=9)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    for axis in axes[len(kinds) - columns : len(kinds)]:
        axis.tick_params(labelbottom=True)  # of panels with an invisible one below
    highest = max(float(fits[key].max()) for key in (error, f"{rival}_error"))
    axes[0].set_ylim(0, 1.05 * highest)  # shared by all panels
    for axis in axes[len(kinds) :]:
        axis.set_visible(False)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    figure.supxlabel("layer", fontsize=9)
    figure.supylabel(label, fontsize=9)
    return figure


def names_of_runs(fits: pd.DataFrame) -> dict[str, str]:
    """{signature: method or kernel, and the settings in which runs of the same one differ}, by name."""
    runs = fits.drop_duplicates("signature").set_index("signature")
    found = {}
    for name, same in runs.groupby(runs["kernel"].where(runs["method"] == "nla", runs["method"]), sort=True):
        shared = set.intersection(*(set(changed.split()) for changed in same["changed"]))
        for signature, changed in same["changed"].items():
            found[str(signature)] = " ".join([name, *(part for part in changed.split() if part not in shared)])
    return found


def retraining(history: list[dict[str, Any]]) -> Figure:
    """Curves over the steps: training and held-out loss on the left, budget and kept parameters on the right."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    left, right = figure.subplots(1, 2, sharex=True)
    steps = pd.DataFrame([row for row in history if "loss" in row])
    watched = pd.DataFrame([row for row in history if "watched" in row])
    left.plot(steps["step"], steps["loss"], linewidth=1, label="training batches")
    if len(watched):
        left.plot(watched["step"], watched["watched"], "o-", markersize=3, label="held-out samples")
    left.set(xlabel="step", ylabel="loss (nats)")
    left.legend(fontsize=8)
    right.plot(steps["step"], steps["budget"] / 1e6, "k--", linewidth=1, label="budget b(t)")
    right.step(steps["step"], steps["kept"] / 1e6, where="post", linewidth=1, label="kept")
    right.set(xlabel="step", ylabel="million parameters", ylim=(0, None))
    right.legend(fontsize=8)
    return figure


def kept_by_matrix(fits: Iterable[FitRecord]) -> Figure:
    """Heat map of the fraction of its parameters that each matrix keeps: a row per kind of matrix, a column per layer."""
    frame = pd.DataFrame([{"name": fit.name, "kept": fit.kept_fraction} for fit in fits])
    frame["kind"] = frame["name"].str.replace(r"^.*\.\d+\.", "", regex=True)
    frame["layer"] = frame["name"].str.extract(r"^(.*\.\d+)\.", expand=False).fillna(frame["name"])
    table = frame.set_index(["kind", "layer"])["kept"].unstack(sort=False)
    figure = Figure(figsize=(max(5, 1.5 + 0.3 * len(table.columns)), 1.2 + 0.35 * len(table)), layout="constrained")
    axis = figure.subplots()
    image = axis.imshow(table, aspect="auto", vmin=0, cmap="viridis")
    axis.set_yticks(range(len(table)), list(table.index))
    labels = table.columns.str.replace(r"^[^\d]*", "", regex=True)
    axis.set_xticks(range(len(labels)), list(labels), fontsize=7, rotation=0 if max(map(len, labels)) < 3 else 90)
    axis.set(xlabel="layer")
    figure.colorbar(image, label="kept fraction")
    return figure


def refined(table: pd.DataFrame) -> Figure:
    """Perplexity by removed fraction, before (dashed) and after (solid) block refinement: a line for each method and budget.

    Args:
        table: of `analysis.tables.refined`.
    """
    figure = Figure(figsize=(7.2, 3.2), layout="constrained")
    axis = figure.subplots()
    for number, ((method, budget), line) in enumerate(table.reset_index().groupby(["method", "budget"], sort=True)):
        rate = re.search(r"\blr=([\d.]+)", str(method))
        name = str(method).partition(" (")[0] + ("" if budget == "uniform" else f", {budget} budget")
        name += f", rate {rate[1]}" if rate else ""
        name += ", closer text" if "calibration=" in str(method) else ""
        colour = f"C{number}"
        axis.plot(100 * line["ratio"], line["refined"], "-", marker="o", markersize=4, color=colour, label=f"{name}, refined")
        if line["fitted"].notna().any():
            axis.plot(100 * line["ratio"], line["fitted"], "--", marker=".", color=colour, label=f"{name}, fitted only")
    axis.axhline(float(table["dense"].mean()), color="k", linewidth=1, label="dense")
    axis.set_yscale("log")
    axis.set_yticks(*plain_ticks(PERPLEXITIES, axis.get_ylim()))
    axis.minorticks_off()
    axis.set_xlabel("removed, % of the parameters of all 210 matrices", fontsize=9)
    axis.set_ylabel("perplexity", fontsize=9)
    axis.set_xticks(sorted({100 * ratio for ratio in table.index.get_level_values("ratio")}))
    figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    return figure


def error_by_cost(table: pd.DataFrame) -> Figure:
    """Weighted error by the seconds (left) and the operations (right) of the fits: a line for each method, a point for each
    number of steps.

    Args:
        table: of `analysis.tables.error_by_steps`, of one ratio and the same matrices.
    """
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    for axis, cost in zip(figure.subplots(1, 2, sharey=True), ("seconds", "operations"), strict=True):
        for method, line in table.reset_index().sort_values("steps").groupby("method", sort=True):
            label = str(method) if cost == "seconds" else None
            axis.plot(line[cost], line["to_svd_llm"], marker="o", markersize=3, linewidth=1, label=label)
        axis.axhline(1, color="k", linestyle="--", linewidth=1, label="SVD-LLM" if cost == "seconds" else None)
        axis.set_xscale("log")
        axis.set_xlabel(f"{cost} of all fits", fontsize=9)
    figure.axes[0].set_ylabel("weighted error, over SVD-LLM's", fontsize=9)
    figure.axes[0].set_ylim(0, None)
    figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    return figure


def by_cost(table: pd.DataFrame, cost: str, label: str, ticks: list[float]) -> Figure:
    """Perplexity by the bits or the operations per weight, both in logarithmic scale: a line for each method, with standard
    errors.

    Args:
        table: of `analysis.tables.by_bits`, of the same matrices and training.
        cost: a column of the table.
        label: what it is.
    """
    figure = Figure(figsize=(7.2, 4), layout="constrained")
    axis = figure.subplots()
    for number, (method, line) in enumerate(table.reset_index().groupby("method", sort=True)):
        ours = str(method).startswith(("phase", "linear"))
        line = line.sort_values("bits taken").drop_duplicates("bits taken")
        axis.errorbar(
            line[cost],
            line["figure"],
            line["stderr"],
            label=str(method),
            color=f"C{number % 10}",
            marker="o" if ours else MARKERS[number % len(MARKERS)],
            linewidth=2 if ours else 1,
            markersize=4,
            capsize=2,
        )
    axis.axhline(float(table["dense"].mean()), color="k", linewidth=1, label="dense, 16 bits")
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xticks(*plain_ticks(ticks, axis.get_xlim()))
    axis.set_yticks(*plain_ticks(PERPLEXITIES, axis.get_ylim()))
    axis.minorticks_off()
    axis.set_xlabel(label, fontsize=9)
    axis.set_ylabel("perplexity", fontsize=9)
    figure.legend(fontsize=8, frameon=False, loc="outside right upper")
    return figure


def plain_ticks(ticks: Sequence[float], limits: tuple[float, float]) -> tuple[list[float], list[str]]:
    """The ticks within the limits of an axis, and their labels."""
    within = [tick for tick in ticks if limits[0] <= tick <= limits[1]]
    return within, [f"{tick:g}" for tick in within]


if __name__ == "__main__":  # python -m analysis.plots: the README's figure, from the records in git
    from analysis.frames import runs_frame
    from analysis.records import IN_GIT, load_records
    from analysis.tables import refined as refined_table

    table = refined_table(runs_frame(load_records([IN_GIT])), "smollm2_135m", "language_modelling.sotu.perplexity")
    names = table.index.get_level_values("method")
    # the hybrid as it is by default; of SVD-LLM, the epochs and the rate that are best at each ratio, for the same fits
    chosen = names.str.contains("calibration=") & ~names.str.contains("harmonic (damping=", regex=False)
    closest = table[chosen].rename(lambda name: name.partition(" (")[0].removeprefix("NLA "), level="method")
    closest = closest.sort_values("refined").groupby(level=list(closest.index.names)).first()
    closest = closest[closest.groupby(level=["budget", "method"])["dense"].transform("size") > 1]  # lines, not points
    refined(closest).savefig(IN_GIT.parent / "refined.png", dpi=110)
