"""Figures, from the data frames of `analysis.records`."""

import pandas as pd
from matplotlib.figure import Figure


def loss_by_layer(fits: pd.DataFrame) -> Figure:
    """Relative error of each matrix by layer, one panel per kind, one line per kernel or method; SVD and floor as references.

    Args:
        fits: rows of `fits_frame`, of one model at one ratio.
    """
    kinds = list(dict.fromkeys(fits["kind"]))
    columns = min(4, len(kinds))
    rows = -(-len(kinds) // columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    for axis, kind in zip(axes, kinds, strict=False):
        of_kind = fits[fits["kind"] == kind].sort_values("layer")
        reference = of_kind.drop_duplicates("layer")
        axis.plot(reference["layer"], reference["svd_error"], "k--", linewidth=1, label="SVD, equal parameters")
        label = of_kind["kernel"].where(of_kind["method"] == "nla", of_kind["method"])
        for name, line in of_kind[of_kind["method"] != "svd"].groupby(label, sort=True):
            drawn = axis.plot(line["layer"], line["relative_error"], marker=".", markersize=3, linewidth=1, label=name)
            if name == "piecewise":
                colour = drawn[0].get_color()
                axis.plot(line["layer"], line["floor"], ":", color=colour, linewidth=1, label="floor of piecewise")
        axis.set_title(kind, fontsize=9)
    highest = max(float(fits[key].max()) for key in ("relative_error", "svd_error"))
    axes[0].set_ylim(0, 1.05 * highest)  # shared by all panels
    for axis in axes[len(kinds) :]:
        axis.set_visible(False)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4, fontsize=8, frameon=False)
    figure.supxlabel("layer", fontsize=9)
    figure.supylabel("relative squared error", fontsize=9)
    return figure


if __name__ == "__main__":  # python -m analysis.plots: the README's figure, from the records in git
    from analysis.records import ROOT, fits_frame, load_records
    from analysis.tables import of_layers

    fits = of_layers(fits_frame(load_records([ROOT / "analysis" / "records"])), "smollm2_135m")
    figure = loss_by_layer(fits[(fits["ratio"] == 0.7) & (fits["changed"] == "") & (fits["method"] == "nla")])
    figure.savefig(ROOT / "analysis" / "loss_by_layer.png", dpi=110)
