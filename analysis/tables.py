"""Tables of our own runs, from the data frames of `analysis.frames`. A cell is empty if no run gives its figure."""

from typing import Any

import pandas as pd

WHOLE = ["layers", "blocks"]  # selections of all linear layers in the blocks of a model
OF_EVERY_ROW = ("steps=", "max_windows=", "windows=", "calibration=", "storage=scaled", "loss=activation")  # of error_by_steps
PAPERS_NAMES = {
    "svd": "SVD", "fwsvd": "FWSVD", "asvd": "ASVD", "svd_llm": "SVD-LLM", "pela": "PELA", "pifa": "PIFA",
    "rtn": "RTN", "gptq": "GPTQ", "quip": "QuIP#", "caldera": "CALDERA", "eora": "EoRA", "lq_lora": "LQ-LoRA",
    "svdquant": "SVDQuant",
}  # fmt: skip


def method_name(row: pd.Series) -> str:
    """Name of a run's method, such as `SVD-LLM` or `NLA piecewise`, and its settings that differ from the defaults."""
    name = PAPERS_NAMES.get(row["method"], row["method"])
    if row["method"] == "nla":
        name = f"NLA {row['kernel']}"
    elif row["method"] == "hybrid":
        name += " " + "+".join(kernel for kernel in row["kernel"].split("+") if kernel != "linear")
    return name + (f" ({row['changed']})" if row["changed"] else "")


def of_layers(frame: pd.DataFrame, model: str, select: str | None = None) -> pd.DataFrame:
    """The rows of a model's runs by ratio, without retraining, and with this selection (default: all layers), named by method.

    Runs that measure cost alone are left out: their fits may be random numbers.

    Raises:
        ValueError: the frame has no runs.
    """
    if frame.empty:
        raise ValueError("no finished runs to show; run.py makes them, and analysis/records has some")
    rows = frame[(frame["model"] == model) & frame["select"].isin(WHOLE if select is None else [select])]
    rows = rows[rows["ratio"].notna()]
    rows = rows[(rows["retrain_steps"] == 0) & ~rows["tasks"].isin(["forward_cost", "latency"])]
    return rows.assign(name_of_method=[method_name(row) for _, row in rows.iterrows()])


def by_ratio(runs: pd.DataFrame, model: str, metric: str) -> pd.DataFrame:
    """A metric, such as `language_modelling.sotu.perplexity`, by method and removed fraction. Ratio 0 is the dense model.

    Runs on fewer windows than usual, and refined runs (see `refined`), are left out.
    """
    rows = of_layers(runs, model)
    rows = rows[rows[f"compressed.{metric}"].notna() & ~rows["changed"].str.contains("max_windows=|refine=")]
    named = ["name_of_method", "ratio"]
    table = rows.drop_duplicates(named, keep="last").pivot(index=named[0], columns="ratio", values=f"compressed.{metric}")
    table.insert(0, 0.0, rows.groupby("name_of_method")[f"dense.{metric}"].first())
    return table.rename_axis(index="method", columns="removed")


def by_bits(runs: pd.DataFrame, model: str, metric: str) -> pd.DataFrame:
    """Runs that were asked for bits per weight: the bits that they take, operations of the forward pass relative to the dense
    model's, a metric, and its multiple of the dense model's.

    Rows are named by the number of matrices, the last training, the method, and the bits that were asked for.
    """
    rows = runs[(runs["model"] == model) & runs["bits"].notna() & runs[f"compressed.{metric}"].notna()]
    names = [name_with_storage(row) + own_settings(row["changed"]) for _, row in rows.iterrows()]
    refined = rows["changed"].str.contains("refine=block")
    after = refined.map({False: "fits", True: "refinement"}).where(rows["retrain_steps"] == 0, "retraining")
    last = rows[f"compressed.{metric}"].where(rows["retrain_steps"] == 0, rows.get(f"retrained.{metric}"))
    final = rows["retrain_steps"] > 0
    error = rows[f"compressed.{metric}_stderr"].mask(final, rows.get(f"retrained.{metric}_stderr"))
    table = rows.assign(method=names, after=after, figure=last, stderr=error)
    table["operations"] = rows["operations"].where(rows["retrain_steps"] == 0)  # a retraining may drop or add triplets
    table = table.assign(times=table["figure"] / table[f"dense.{metric}"])
    table = table.rename(columns={"selected_per_weight": "bits taken", f"dense.{metric}": "dense"})
    columns = ["bits taken", "operations", "dense", "figure", "stderr", "times", "weighted_error", "fit_seconds"]
    return table.set_index(["matrices", "after", "method", "bits"])[columns].sort_index()


def with_latency(table: pd.DataFrame, runs: pd.DataFrame, model: str) -> pd.DataFrame:
    """The rows of `by_bits` whose size was also run with `task=latency`, with two more columns.

    `token` is the seconds of a token at batch 1, relative to the dense model's; `read` is the MB of parameters that it reads.
    """
    timed = runs[(runs["model"] == model) & runs["bits"].notna() & runs["compressed.latency.decode_1.to_dense"].notna()]
    timed = timed.assign(
        method=[name_with_storage(row) for _, row in timed.iterrows()],
        token=timed["compressed.latency.decode_1.to_dense"],
        read=timed["compressed.latency.decode_1.parameter_bytes_per_token"] / 1e6,
    )
    names = ["matrices", "method", "bits"]
    return table.join(timed.set_index(names)[["token", "read"]], on=names, how="inner")


def own_settings(changed: str) -> str:
    """The settings that a run has and others of its size have not, in brackets; nothing if there are none."""
    usual = ("windows=", "dtype=", "loss=activation", "storage=", "refine=", "calibration=")
    own = [pair for pair in changed.split() if not pair.startswith(usual)]
    return f" ({' '.join(own)})" if own else ""


def name_with_storage(row: pd.Series) -> str:
    """Name of a method or kernel, with a word on how its factors are stored unless their numbers have the model's type."""
    name = PAPERS_NAMES.get(row["method"]) or row["kernel"]
    return name if row["storage"] == "float" else f"{name}, {row['storage']}"


def error_by_steps(fits: pd.DataFrame, model: str, select: str) -> pd.DataFrame:
    """Weighted error of fits with few and with many steps, mean over the matrices, and its ratio to SVD-LLM's with as many
    parameters.

    `seconds` and `operations` are sums over the matrices. `matrices` counts them; `steps` is the largest number of a fit.
    """
    rows = of_layers(fits, model, select)
    rows = rows[rows["steps"] > 0]
    kept = rows["changed"].str.split().map(lambda pairs: [p for p in pairs if not p.startswith(OF_EVERY_ROW)])
    named = rows.assign(changed=kept.map(" ".join))
    names = [method_name(row) for _, row in named.iterrows()]
    table = (
        rows.assign(name=names)
        .groupby(["ratio", "name", "signature"])
        .agg(
            matrices=("weighted_error", "size"),
            steps=("steps", "max"),
            weighted_error=("weighted_error", "mean"),
            svd_llm_error=("svd_llm_error", "mean"),
            seconds=("seconds", "sum"),
            operations=("flops", "sum"),
        )
    )
    table.insert(2, "to_svd_llm", table["weighted_error"] / table["svd_llm_error"])
    table = table.reset_index("signature", drop=True).set_index("steps", append=True)
    return table.rename_axis(index=["removed", "method", "steps"]).sort_index()


def refined(runs: pd.DataFrame, model: str, metric: str) -> pd.DataFrame:
    """A metric before and after block refinement, for each method that was refined. `excess` is refined - dense.

    `fitted` is that of the run with equal settings and without refinement, if there is one. At other ratios of the same method
    it may stand alone.
    """
    rows = of_layers(runs, model)
    rows = rows[rows[f"compressed.{metric}"].notna()]
    words = rows["changed"].str.split()
    same = words.map(lambda pairs: " ".join(p for p in pairs if p.partition("=")[0] not in ("refine", "epochs", "budget")))
    rows = rows.assign(
        method=[method_name(pd.Series({**row, "changed": s})) for (_, row), s in zip(rows.iterrows(), same, strict=True)]
    )
    index = ["ratio", "budget", "method"]
    trained = words.map(lambda pairs: "refine=block" in pairs)
    table = rows[trained].set_index(index)[[f"dense.{metric}", f"compressed.{metric}"]].set_axis(["dense", "refined"], axis=1)
    fitted = rows[~trained].set_index(index)[[f"dense.{metric}", f"compressed.{metric}"]].set_axis(["beside", "fitted"], axis=1)
    refined_ones = {(budget, method) for _, budget, method in table.index}
    fitted = fitted[[(budget, method) in refined_ones for _, budget, method in fitted.index]]
    table = table.join(fitted, how="outer").sort_index()
    table = table.assign(dense=table["dense"].fillna(table["beside"]))[["dense", "fitted", "refined"]]
    return table.assign(excess=table["refined"] - table["dense"])


def retrained(runs: pd.DataFrame, model: str, metric: str) -> pd.DataFrame:
    """One row per retrained run: a metric of the dense, compressed and retrained model, and the steps, data and seconds.

    With an adaptive budget, `compressed` is the model before retraining reduces it to its final size.
    """
    rows = runs[(runs["model"] == model) & (runs["retrain_steps"] > 0) & runs["select"].isin(WHOLE)]
    rows = rows.assign(method=[start_name(row) for _, row in rows.iterrows()])
    columns = {f"{stage}.{metric}": stage for stage in ("dense", "compressed", "retrained")}
    columns |= {"retrain_steps": "steps", "tokens": "tokens", "samples": "samples", "retrain_seconds": "seconds"}
    index = ["ratio", "method", "budget", "retraining", "seed"]
    table = rows.set_index(index).reindex(columns=list(columns)).rename(columns=columns).sort_index()
    table.insert(3, "x dense", table["retrained"] / table["dense"])
    return table.drop(columns=[c for c in ("tokens", "samples") if table[c].isna().all()])


def start_name(row: pd.Series) -> str:
    """Name of the method that was retrained, and its settings, except budget and seed, that differ from the defaults."""
    changed = [pair for pair in row["changed"].split() if pair.partition("=")[0] not in ("budget", "seed")]
    return method_name(pd.Series({**row, "changed": " ".join(changed)}))


def adaptive_or_not(runs: pd.DataFrame, model: str, metric: str) -> pd.DataFrame:
    """Adaptive beside uniform budgets at equal final parameters and steps: mean, standard deviation and count over seeds."""
    table = retrained(runs, model, metric).reset_index()
    same = ["ratio", "method", "retraining", "steps"]
    over_seeds: list[Any] = ["mean", "std", "count"]
    is_adaptive = table["budget"].astype(str).str.startswith("adaptive")
    uniform = table[table["budget"] == "uniform"].groupby(same)["retrained"].agg(over_seeds).add_suffix(" uniform")
    adaptive = table[is_adaptive].groupby([*same, "budget"])["retrained"].agg(over_seeds).add_suffix(" adaptive")
    both = adaptive.reset_index("budget").join(uniform, how="inner")
    both["adaptive - uniform"] = both["mean adaptive"] - both["mean uniform"]
    return both.set_index("budget", append=True)


def accuracy(runs: pd.DataFrame, model: str, prefix: str) -> pd.DataFrame:
    """Metrics whose names begin with `prefix`, such as `commonsense.everyday`: the dense model, then one row per run."""
    rows = of_layers(runs, model).sort_values(["ratio", "name_of_method"])
    columns = [c for c in map(str, rows) if c.startswith(f"compressed.{prefix}")]
    rows = rows[rows[columns].notna().any(axis=1)]
    table = rows.set_index(["ratio", "name_of_method"])[columns]
    table.columns = [c.removeprefix(f"compressed.{prefix}.") for c in columns]
    dense = rows.iloc[:1][[c.replace("compressed.", "dense.", 1) for c in columns]].set_axis(table.columns, axis=1)
    dense.index = pd.MultiIndex.from_tuples([(0.0, "dense")])
    return pd.concat([dense, table]).rename_axis(index=["removed", "method"])


def error_by_method(fits: pd.DataFrame, model: str) -> pd.DataFrame:
    """Mean errors by method and removed fraction. `to_svd` is the ratio to the error of SVD with as many parameters."""
    rows = of_layers(fits, model)
    rows = rows.assign(to_svd=rows["relative_error"] / rows["svd_error"])
    return rows.groupby(["ratio", "name_of_method"])[
        ["relative_error", "svd_error", "floor", "to_svd", "weighted_error", "svd_llm_error", "weighted_floor"]
    ].mean()


def error_by_kind(fits: pd.DataFrame, model: str, ratio: float) -> pd.DataFrame:
    """Mean relative error by kind of matrix: one column per method, and the floor of the piecewise kernel."""
    rows = of_layers(fits[fits["ratio"] == ratio], model)
    table = rows.pivot_table(index="kind", columns="name_of_method", values="relative_error", sort=False)
    floors = rows[rows["kernel"] == "piecewise"].groupby("kind")["floor"].mean()
    return table.assign(**{"floor of piecewise": floors})


def kernel_ablation(fits: pd.DataFrame, model: str, select: str, ratio: float) -> pd.DataFrame:
    """Error, cost and memory of the fits of each kernel on the same matrices."""
    rows = of_layers(fits[(fits["ratio"] == ratio) & (fits["method"] == "nla")], model, select)
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
