"""The paper's tables: published figures beside those of runs with the settings of a table's experiment in conf/experiment.

Every function takes the records of runs. Published figures have a source. `measured` is of the paper's model, from runs of the
experiment, and empty without such a run. The last columns are of the experiment's small twin, under its own name: another model
on other data, never subtracted from a published figure. Figures are means over seeds.
"""

import pandas as pd

from analysis.experiments import mean_by_row
from analysis.paper_runs import (
    Figure,
    Records,
    average_accuracy,
    bytes_of,
    column,
    column_name,
    columns,
    evaluated,
    mean_error,
    mean_to_svd,
    million_parameters,
    pair,
)
from analysis.published import beside, perplexity_by_source, published_by

ORIGINAL = (0.0, "Original")
SWIN_ROWS = {"pela": "PELA", "adaptive": "NLA", "uniform": "NLA without adaptive budget"}


def perplexity(records: Records, data: str) -> pd.DataFrame:
    """LLaMA-7B without retraining, on `wikitext2`, `ptb` or `c4`. `x dense` is a figure divided by that of its dense model.

    `difference` is `measured` minus the figure of the first source that has one. The last column is of the twin on the same
    text, from `experiment=perplexity_texts_smollm2`.
    """
    published = perplexity_by_source(data, retrained=False)
    own, twin = conversions(records, data)
    first = published.bfill(axis=1).iloc[:, 0]
    table = beside(published, own, twin, first)
    table.insert(len(published.columns), "published x dense", first / first[ORIGINAL])
    same = on_text(records, pair("perplexity", "llama7b")[1], {"data": data}).rename_axis(table.index.names)
    return table.assign(**{f"{twin.name}, x dense": twin / twin[ORIGINAL], f"{str(twin.name).split()[0]} on {data}": same})


def conversion(records: Records) -> pd.DataFrame:
    """The paper's "conversion only" row of LLaMA-7B on WikiText-2. Its figure of NLA is not that of the main table."""
    published = published_by("conversion_perplexity", {"ratio": "removed", "method": "method"})
    table = beside(published, *conversions(records, "wikitext2"), published["published perplexity"])
    return table.loc[published.index]


def conversions(records: Records, data: str) -> tuple[pd.Series, pd.Series]:
    """Perplexities by (ratio, method) of the runs of perplexity_llama7b on a text, and of its twin's on the twin's own text."""
    own, twin = pair("perplexity", "llama7b")
    return on_text(records, own, {"data": data}), on_text(records, twin, {})


def on_text(records: Records, experiment: str, fixed: dict[str, str]) -> pd.Series:
    """Perplexities by (ratio, method) of the runs of an experiment with these further settings. `Original` is dense."""
    keys = ("ratio", "method")
    found, dense = (column(records, experiment, keys, evaluated(s, "perplexity"), fixed) for s in ("compressed", "dense"))
    found[ORIGINAL] = dense.mean()
    return found


def after_fine_tuning(records: Records, data: str) -> pd.DataFrame:
    """LLaMA-7B after fine-tuning, on `wikitext2` or `c4`. The paper's NLA has an adaptive budget, SVD-LLM a uniform one.

    `difference` is `measured` minus the figure of the first source that has one.
    """
    published = perplexity_by_source(data, retrained=True).reset_index("removed").reset_index("method")
    published["budget"] = ["adaptive" if method == "NLA" else "uniform" for method in published["method"]]
    published = published.set_index(["removed", "method", "budget"])
    keys = ("ratio", "method", "budget")
    found = columns("retrained", "llama7b", records, keys, evaluated("retrained", "perplexity"), {"data": data})
    return beside(published, *found, published.bfill(axis=1).iloc[:, 0])


def kernels_after_fine_tuning(records: Records) -> pd.DataFrame:
    """LLaMA-7B after fine-tuning with three kernels, all fitted to the layers' outputs. The paper has no such table."""
    keys = ("ratio", "kernel", "budget")
    found = columns("retrained_kernels", "llama7b", records, keys, evaluated("retrained", "perplexity"))
    nothing = pd.DataFrame(index=pd.MultiIndex.from_tuples([], names=["removed", *keys[1:]]))
    return beside(nothing, *found, None)


def commonsense(records: Records) -> pd.DataFrame:
    """LLaMA-7B's mean accuracy over the paper's seven tasks, without retraining. The twin answers this project's questions."""
    published = published_by("commonsense", {"ratio": "removed", "method": "method"})
    found = columns("commonsense", "llama7b", records, ("ratio", "method"), average_accuracy)
    return beside(published, *found, published["published accuracy"])


def swin(records: Records) -> pd.DataFrame:
    """Swin-Base on ImageNet-1k after retraining: top-1 accuracy, and million parameters of the whole model."""
    published = published_by("swin", {"method": "method"}).drop(columns="published retrained")
    own, twin = (swin_column(records, name, evaluated("retrained", "top1"), evaluated("dense", "top1")) for name in SWINS)
    table = beside(published, own, twin.rename(f"{twin.name}: top1"), published["published top1"]).loc[published.index]
    sizes = [
        swin_column(records, name, million_parameters("model_after"), million_parameters("model_before")) for name in SWINS
    ]
    table = table.rename(columns={"measured": "measured top1"})
    return table.assign(**{"measured parameters": sizes[0], f"{twin.name}: parameters": sizes[1]})


SWINS = pair("swin", "swin_base")


def swin_column(records: Records, model: str, figure: Figure, dense: Figure) -> pd.Series:
    """A figure by row of the table of Swin: from the runs of `experiment=<model>` and `experiment=pela_<model>`."""
    runs = [(model, ("budget",)), (f"pela_{model}", ("method",))]
    found = {row[0]: x for name, keys in runs for row, x in mean_by_row(records, name, keys, figure).items()}
    originals = [x for name, keys in runs for x in mean_by_row(records, name, keys, dense).values()]
    rows = {"Swin-Base": pd.Series(originals, dtype=float).mean()}
    rows |= {name: found.get(key) for key, name in SWIN_ROWS.items()}
    return pd.Series(rows, dtype=float, name=column_name(model))


def adaptive(records: Records) -> pd.DataFrame:
    """OPT-1.3B after retraining, with an adaptive and a uniform budget of the same final size."""
    published = published_by("adaptive", {"adaptive": "budget"}).rename({True: "adaptive", False: "uniform"})
    found = columns("adaptive", "opt_1_3b", records, ("budget",), evaluated("retrained", "perplexity"))
    return beside(published, *found, published["published perplexity"])


def kernel_inference(records: Records) -> pd.DataFrame:
    """Seconds, and gigabytes of weights and peak, of LLaMA-7B's inference of one window of text, by kernel.

    The paper does not say how many tokens its figures are of, so that nothing is subtracted.
    """
    figures = {"seconds": evaluated("compressed", "inference_seconds"), "gigabytes": bytes_of("inference", 1e9)}
    found = {unit: columns("kernels", "llama7b", records, ("kernel",), figure) for unit, figure in figures.items()}
    table = published_by("kernel_inference", {"kernel": "kernel"})
    table = table.reindex(found["seconds"][0].index.rename("kernel"))
    for unit, (own, twin) in found.items():
        table = table.assign(**{f"measured {unit}": own, f"{twin.name}: {unit}": twin})
    return table


def forward_memory(records: Records) -> pd.DataFrame:
    """Megabytes of a training step of OPT-1.3B, weights and peak, with algorithm 1 (`three terms`) and without.

    The paper does not give its batch, so that nothing is subtracted.
    """
    published = published_by("forward_memory", {"form": "form"})
    found = columns("forward", "opt_1_3b", records, ("forward",), bytes_of("training", 1e6))
    own, twin = (figures.rename({"triplets": "three terms", "reconstruct": "reconstructing"}) for figures in found)
    return beside(published, own, twin, None)


def fitting_loss(records: Records) -> pd.DataFrame:
    """Mean over OPT-1.3B's matrices of the relative error, as it is and divided by that of SVD with as many parameters.

    The paper gives the second figure without a removed fraction. It stands at each one.
    """
    keys = ("ratio", "method")
    own, twin = columns("fitting_loss", "opt_1_3b", records, keys, mean_to_svd)
    errors = columns("fitting_loss", "opt_1_3b", records, keys, mean_error)
    rows = own.index[own.index.get_level_values("method") == "NLA"].rename(["removed", "method"])
    published = published_by("fitting_loss", {"method": "method"}).loc[["NLA"] * len(rows)].set_axis(rows)
    table = beside(published, own, twin.rename(f"{twin.name}: to_svd"), published["published to_svd"])
    table = table.rename(columns={"measured": "measured to_svd"})
    return table.assign(**{"measured error": errors[0], f"{twin.name}: error": errors[1]})
