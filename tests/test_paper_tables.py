"""Tests of the paper's tables: a run with the settings of an experiment fills its cell, and any other run fills none."""

import itertools
from copy import deepcopy
from functools import cache

import pandas as pd
import pytest
import yaml

from analysis import paper_tables, settings
from analysis.composed import composed, sweep
from analysis.paper_runs import TWINS, column_name
from analysis.published import PAPER, paper, sources
from analysis.records import IN_GIT, load_records, write_collection
from analysis.settings import model_name
from nla.harness.fits_table import FitRecord
from nla.harness.record import Parameters, RunRecord
from nla.harness.request import prepare
from tests.conftest import options

EXPERIMENTS = [name for name in options("experiment") if name.endswith(tuple(TWINS))]
NAMES = {"nla": "NLA", "svd": "SVD", "svd_llm": "SVD-LLM", "asvd": "ASVD", "fwsvd": "FWSVD"}
TEXTS = ("wikitext2", "ptb", "c4")
TABLES = {
    "conversion": paper_tables.conversion,
    "kernels_after_fine_tuning": paper_tables.kernels_after_fine_tuning,
    "commonsense": paper_tables.commonsense,
    "swin": paper_tables.swin,
    "adaptive": paper_tables.adaptive,
    "kernel_inference": paper_tables.kernel_inference,
    "forward_memory": paper_tables.forward_memory,
    "fitting_loss": paper_tables.fitting_loss,
}
TABLES |= {f"perplexity {data}": lambda records, data=data: paper_tables.perplexity(records, data) for data in TEXTS}
TABLES |= {f"tuned {data}": lambda records, data=data: paper_tables.after_fine_tuning(records, data) for data in TEXTS[::2]}


def row_cells(experiment: str, row: dict[str, str]) -> list[tuple[str, object]]:
    """(table, index) of the cells that a row of an experiment must fill, without those of the dense model."""
    ratio, method = float(row.get("ratio", 0)), NAMES.get(row.get("method", ""))
    table = experiment.removesuffix("_llama7b").removesuffix("_opt_1_3b")
    if table == "perplexity":
        extra = [(0.6, "FWSVD"), (0.7, "NLA")] if row["data"] == "wikitext2" else []
        return [(f"perplexity {row['data']}", (ratio, method))] + [("conversion", at) for at in extra if at == (ratio, method)]
    if table == "adaptive":
        return [("adaptive", row["budget"])]
    if table == "forward":
        return [("forward_memory", "three terms" if row["forward"] == "triplets" else "reconstructing")]
    return {
        "retrained": [("tuned wikitext2", (ratio, method, row.get("budget")))],
        "retrained_kernels": [("kernels_after_fine_tuning", (ratio, row.get("kernel"), row.get("budget")))],
        "commonsense": [("commonsense", (0.5, method))],
        "kernels": [("kernel_inference", row.get("kernel"))],
        "fitting_loss": [("fitting_loss", (ratio, method))],
        "swin_base": [("swin", "NLA" if row.get("budget") == "adaptive" else "NLA without adaptive budget")],
        "pela_swin_base": [("swin", "PELA")],
    }[table]


def dense_cells(experiment: str) -> set[tuple[str, object]]:
    """The cells that any row of an experiment fills with figures of the dense model."""
    if experiment.startswith("perplexity"):
        return {("conversion", (0.0, "Original"))} | {(f"perplexity {data}", (0.0, "Original")) for data in TEXTS}
    return {("swin", "Swin-Base")} if "swin" in experiment else set()


def swept(experiment: str) -> list[dict[str, str]]:
    choices = sweep(experiment)
    return [dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values())]


def made_up(config: dict, figure: float) -> RunRecord:
    """The record of a run with this configuration, in which every figure of the compressed model is the same."""
    (task,) = (name for name, value in config["task"].items() if isinstance(value, dict))
    data = "average" if task == "commonsense" else config["task"][task]["data"]["name"]
    names = ("perplexity", "acc", "top1", "inference_seconds", "resident_bytes", "inference_peak_bytes", "training_peak_bytes")
    figures = dict.fromkeys(names, figure)
    stages = ["dense", "compressed"] + ["retrained"] * ("retrain" in config)
    fit = FitRecord(
        name="layers.0.fc", shape=(4, 4), terms="linear h=1 r=1", n_params=8, bits=8, relative_error=figure, svd_error=1.0,
        floor=0.0, steps=0, seconds=1.0, flops=1, peak_bytes=1, status="optimal",
    )  # fmt: skip
    size = int(figure * 1e6)
    return RunRecord(
        signature=f"{figure:016.2f}",
        status="done",
        environment={"commit": "1", "dirty": False},
        config=config,
        metrics={stage: {task: {data: figures}} for stage in stages},
        peak_bytes={"retrain": size} if "retrain" in config else {},
        fits=[fit],
        parameters=Parameters(
            selected_before=1, selected_after=1, model_before=size, model_after=size, ratio=0.5, model_ratio=0.5
        ),
    )


def recorded_config(cache_dir, experiment: str, row: dict[str, str]) -> dict:
    """The configuration that a run of this row has in its record."""
    overrides = [f"{key}={value}" for key, value in row.items()]
    return prepare(deepcopy(composed(f"experiment={experiment}", *overrides)) | {"cache_dir": str(cache_dir)}).values


def measured(records: list[RunRecord]) -> dict[tuple[str, object], float]:
    """{(table, index): figure} of all cells of measured columns that are filled."""
    return filled_cells({name: make(records) for name, make in TABLES.items()})


def filled_cells(tables: dict[str, pd.DataFrame]) -> dict[tuple[str, object], float]:
    found = {}
    for name, table in tables.items():
        for column in (c for c in table if c.startswith("measured")):
            found |= {(name, index): value for index, value in table[column].dropna().items()}
    return found


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("inventories")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_row_of_a_papers_experiment_fills_exactly_its_cells(experiment, cache_dir):
    rows = swept(experiment)
    records = [made_up(recorded_config(cache_dir, experiment, row), 100.0 + i) for i, row in enumerate(rows)]
    filled = measured(records)
    wanted = {
        cell: record.fits[0].relative_error
        for record, row in zip(records, rows, strict=True)
        for cell in row_cells(experiment, row)
    }
    units = {cell: {"kernel_inference": 2e-9, "forward_memory": 2e-6}.get(cell[0], 1) for cell in wanted}  # weights and peak
    assert set(filled) - dense_cells(experiment) == set(wanted)
    assert {cell: filled[cell] for cell in wanted} == pytest.approx({cell: wanted[cell] * units[cell] for cell in wanted})
    assert dense_cells(experiment) <= set(filled)


OTHER = {
    "statistics.length": 512,
    "statistics.windows": 7,
    "statistics.data.name": "sotu",
    "task.max_windows": 3,
    "task.max_images": 3,
    "task.limit": 3,
    "task.window": 1024,
    "task.length": 3,
    "task.forward_cost.data.name": "digits",
    "task.language_modelling.data.name": "sotu",
    "task.imagenet.data.name": "digits",
    "method.solver.steps": 3,
    "method.solver.start": "other",
    "method.kernel.r": 3,
    "method.loss": "other",
    "budget._target_": "nla.budget.effective_rank.EffectiveRank",
    "forward": "other",
    "retrain.steps": 3,
    "retrain.lr": 0.1,
    "retrain.data.name": "sotu",
    "select.include": "fc",
    "bits": 2.0,
    "dtype": "float16",
    "model.revision": "other",
    "model.name": "somebody/else",
    "model.architecture.num_hidden_layers": 3,
    "model.architecture.num_classes": 3,
}


def changed(config: dict, key: str, value: object) -> dict | None:
    """The configuration with another value of a dotted key, or None if it does not have the key."""
    config = deepcopy(config)
    *groups, last = key.split(".")
    node = config
    for group in groups:
        node = node.get(group, {})
    if last not in node:
        return None
    node[last] = value
    return config


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_run_with_any_other_setting_fills_no_cell(experiment, cache_dir):
    config = recorded_config(cache_dir, experiment, swept(experiment)[0])
    assert measured([made_up(config, 1.0)])
    others = {key: changed(config, key, value) for key, value in OTHER.items()}
    wrong = {key: other for key, other in others.items() if other is not None}
    assert len(wrong) >= 8
    records = [made_up(other, 2.0 + i) for i, other in enumerate(wrong.values())]  # a filled cell shows which by its figure
    assert not measured(records), list(wrong)


@pytest.mark.parametrize(
    "key", ["seed", "model.path", "device", "outputs_dir", "retrain.recompute", "retrain.processes", "retrain.products"]
)
def test_settings_that_change_no_figure_do_not_empty_a_cell(key, cache_dir):
    config = recorded_config(cache_dir, "retrained_llama7b", swept("retrained_llama7b")[0])
    assert measured([made_up(changed(config, key, 2), 1.0)]) == measured([made_up(config, 1.0)]) != {}


def test_a_run_without_one_of_the_settings_fills_no_cell(cache_dir):
    config = recorded_config(cache_dir, "retrained_llama7b", swept("retrained_llama7b")[0])
    for group, key in (("retrain", "clip"), ("retrain", "length")):
        less = config | {group: {k: v for k, v in config[group].items() if k != key}}
        assert key in config[group] and not measured([made_up(less, 1.0)])


def test_a_cell_is_the_mean_over_seeds(cache_dir):
    config = recorded_config(cache_dir, "adaptive_opt_1_3b", {"budget": "adaptive"})
    records = [made_up(config | {"seed": seed}, 10.0 + seed) for seed in range(3)]
    assert measured(records) == {("adaptive", "adaptive"): pytest.approx(11.0)}


def test_runs_that_differ_in_their_data_alone_are_all_read_back(cache_dir, tmp_path):
    row = {"ratio": "0.5", "method": "svd_llm"}
    configs = [recorded_config(cache_dir, "perplexity_llama7b", row | {"data": data}) for data in TEXTS]
    configs += [recorded_config(cache_dir, "perplexity_llama7b", row | {"data": "ptb", "calibration": "sotu"})]
    write_collection([made_up(config, 1.0 + i) for i, config in enumerate(configs)], tmp_path)
    filled = measured(load_records([tmp_path]))
    assert [filled[f"perplexity {data}", (0.5, "SVD-LLM")] for data in TEXTS] == [1.0, 2.0, 3.0]


def test_figures_of_a_small_model_stand_under_its_own_name_and_are_never_subtracted():
    records = load_records([IN_GIT])
    tables = {name: make(records) for name, make in TABLES.items()}
    assert not filled_cells(tables)
    assert all("difference" not in table or table["difference"].isna().all() for table in tables.values())
    table = tables["perplexity wikitext2"]
    twin = table[column_name("perplexity_smollm2")]
    assert twin.name == "smollm2_135m on sotu"
    assert twin[0.0, "Original"] == pytest.approx(20.617, abs=1e-3) and twin[0.2, "SVD-LLM"] > 20.7
    assert table.loc[(0.6, "SVD-LLM"), ["published by nla", "published by svd_llm"]].tolist() == [42.30, 66.62]
    assert tables["adaptive"]["opt_small on sotu"].notna().all()
    assert tables["swin"]["swin_micro_fashion on fashion_mnist: top1"].notna().all()


def test_a_difference_is_the_measured_figure_minus_the_first_published_one(cache_dir):
    row = {"data": "ptb", "ratio": "0.5", "method": "svd_llm"}
    table = paper_tables.perplexity([made_up(recorded_config(cache_dir, "perplexity_llama7b", row), 200.0)], "ptb")
    assert table.loc[(0.5, "SVD-LLM"), "difference"] == pytest.approx(200 - 150.58)


def test_a_model_is_named_by_the_yaml_whose_settings_it_has(monkeypatch):
    model = composed("model=llama7b")["model"]
    assert model_name(model) == model_name(model | {"path": "/copy", "device_map": "auto"}) == "llama7b"
    assert model_name(model | {"revision": "old"}) == "llama7b revision=old"
    assert model_name(model | {"name": "somebody/else"}) == "somebody/else"
    old = model | {"revision": "old"}
    monkeypatch.setattr(settings, "group_options", lambda group: {"llama7b": model, "llama7b_old": old})
    monkeypatch.setattr(settings, "composed", lambda o: {"model": {"model=llama7b": model, "model=llama7b_old": old}[o]})
    assert (model_name(model), model_name(old)) == ("llama7b", "llama7b_old")


@pytest.mark.parametrize("table", [name for name in yaml.safe_load(PAPER.read_text()) if name != "sources"])
def test_published_figures_carry_their_source_and_stand_in_a_table(table):
    published = paper(table)
    assert published["source"].str.contains(r"ICLR 202[56]").all() and len(sources()) == 2
    numbers = published.select_dtypes("number").drop(columns=["ratio"], errors="ignore").to_numpy().ravel()
    assert {float(x) for x in numbers if pd.notna(x)} <= shown_figures()


@cache
def shown_figures() -> set[float]:
    """All published figures that the tables show."""
    shown = pd.concat([make([]).filter(like="published") for make in TABLES.values()])
    return {float(x) for x in shown.to_numpy().ravel() if pd.notna(x)}
