"""Tables of seconds and memory from runs of `task=forward_cost`."""

import pandas as pd

from analysis.tables import WHOLE

FORWARD = "forward=reconstruct"
FIGURES = {
    "inference s": "inference_seconds",
    "inference MB": "inference_peak_bytes",
    "training s": "training_seconds",
    "training MB": "training_peak_bytes",
    "weights MB": "resident_bytes",
}


def forward_cost(runs: pd.DataFrame, model: str, data: str, ratio: float, tokens: int | None = None) -> pd.DataFrame:
    """Cost of the forward pass and of a training step by method, kernel and form of the forward pass, fastest first.

    Seconds are medians. MB are peaks beside the weights. `x dense` divides the seconds of inference by those of the dense
    model that the same run measured. The row `dense` has the medians over all these runs.

    Args:
        tokens: tokens that were read at once; None for images.
    """
    prefix = f"forward_cost.{data}"
    measured, read = f"compressed.{prefix}.inference_seconds", f"compressed.{prefix}.tokens"
    rows = runs.reindex(columns=list(dict.fromkeys([*runs, measured, read])))
    rows = rows[(rows["model"] == model) & (rows["ratio"] == ratio) & rows["select"].isin(WHOLE) & rows[measured].notna()]
    if tokens is not None:
        rows = rows[rows[read] == tokens]
    if rows.empty:
        return pd.DataFrame(columns=[*FIGURES, "x dense"])
    form = ["reconstruct" if FORWARD in changed.split() else "triplets" for changed in rows["changed"]]
    parts = {stage: figures(rows, f"{stage}.{prefix}") for stage in ("compressed", "dense")}
    table = parts["compressed"].assign(**{"x dense": parts["compressed"]["inference s"] / parts["dense"]["inference s"]})
    table.index = pd.MultiIndex.from_arrays([rows["method"], rows["kernel"], form], names=["method", "kernel", "forward"])
    dense = parts["dense"].median().to_frame().T.assign(**{"x dense": 1.0})
    dense.index = pd.MultiIndex.from_tuples([("dense", "", "")], names=table.index.names)
    return pd.concat([dense, table.sort_values("inference s")])


def figures(rows: pd.DataFrame, prefix: str) -> pd.DataFrame:
    """The columns of FIGURES of one stage, bytes in MB."""
    found = {name: rows[f"{prefix}.{metric}"] / (1e6 if "bytes" in metric else 1) for name, metric in FIGURES.items()}
    return pd.DataFrame(found)
