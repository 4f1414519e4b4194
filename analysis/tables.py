"""Tables of the notebooks, from the data frames of `analysis.records`. A cell is empty where nothing was run."""

from pathlib import Path

import pandas as pd
import yaml

PAPER = Path(__file__).with_name("paper.yaml")


def paper(table: str) -> pd.DataFrame:
    """One table of published figures, with the full source in the last column."""
    content = yaml.safe_load(PAPER.read_text())
    return pd.DataFrame(content[table]).assign(source=lambda rows: rows["source"].map(content["sources"]))


def method_name(row: pd.Series) -> str:
    """`svd`, or `nla` with its kernel, and the settings that are not the defaults."""
    name = "svd" if row["method"] == "svd" else f"nla {row['kernel']}"
    return name + (f" ({row['changed']})" if row["changed"] else "")


def of_layers(frame: pd.DataFrame, model: str, include: str = r"\blayers\.") -> pd.DataFrame:
    """The rows of a model's runs with this selection (default: every layer), named by method."""
    if frame.empty:
        raise ValueError("there are no finished runs to show; run.py makes them, analysis/records has some")
    rows = frame[(frame["model"] == model) & (frame["include"] == include)]
    return rows.assign(name_of_method=[method_name(row) for _, row in rows.iterrows()])


def conversion_perplexity(runs: pd.DataFrame, model: str, data: str) -> pd.DataFrame:
    """Perplexity by method and removed fraction, the dense model's as ratio 0."""
    rows = of_layers(runs, model)
    compressed, dense = (f"{stage}.language_modelling.{data}.perplexity" for stage in ("compressed", "dense"))
    table = rows.pivot(index="name_of_method", columns="ratio", values=compressed)
    table.insert(0, 0.0, rows.groupby("name_of_method")[dense].first())
    return table.rename_axis(index="method", columns="removed")


def error_by_method(fits: pd.DataFrame, model: str) -> pd.DataFrame:
    """Mean relative error by method and removed fraction, and its ratio to SVD's with as many parameters."""
    rows = of_layers(fits, model)
    rows = rows.assign(to_svd=rows["relative_error"] / rows["svd_error"])
    return rows.groupby(["ratio", "name_of_method"])[["relative_error", "svd_error", "floor", "to_svd"]].mean()


def error_by_kind(fits: pd.DataFrame, model: str, ratio: float) -> pd.DataFrame:
    """Mean relative error by kind of matrix, a column per method, beside SVD's with as many parameters."""
    rows = of_layers(fits[fits["ratio"] == ratio], model)
    table = rows.pivot_table(index="kind", columns="name_of_method", values="relative_error", sort=False)
    floors = rows[rows["kernel"] == "piecewise"].groupby("kind")["floor"].mean()
    return table.assign(**{"floor of piecewise": floors})


def kernel_ablation(fits: pd.DataFrame, model: str, include: str, ratio: float) -> pd.DataFrame:
    """Error, cost and memory of the fits of each kernel on the same matrices."""
    rows = of_layers(fits[(fits["ratio"] == ratio) & (fits["method"] == "nla")], model, include)
    means = rows.groupby("name_of_method").agg(
        relative_error=("relative_error", "mean"),
        svd_error=("svd_error", "mean"),
        floor=("floor", "mean"),
        n_params=("n_params", "sum"),
        steps=("steps", "max"),
        fit_seconds=("seconds", "sum"),
        fit_peak_bytes=("peak_bytes", "max"),
    )
    means.insert(2, "to_svd", means["relative_error"] / means["svd_error"])
    return means.sort_values("relative_error").rename_axis(index="kernel")
