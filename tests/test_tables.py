"""Tests of the tables and figures that are made from records."""

import math

import pandas as pd
import pytest
import torch

from analysis import plots, tables
from analysis.benchmarks.forward import compare_forms
from analysis.costs import forward_cost
from analysis.frames import fits_frame, runs_frame
from analysis.paper_runs import evaluated
from analysis.plots import kept_by_matrix, loss_by_layer
from analysis.records import IN_GIT, load_records
from analysis.tables import accuracy, adaptive_or_not, by_ratio, retrained
from nla.harness.fits_table import FitRecord
from nla.harness.record import RunRecord
from nla.harness.tracked_figures import metric_rows, summary
from nla.kernels.piecewise import Piecewise

PERPLEXITY = "language_modelling.sotu.perplexity"


@pytest.fixture(scope="module")
def records():
    return load_records([IN_GIT])


@pytest.fixture(scope="module")
def runs(records):
    return runs_frame(records)


@pytest.fixture(scope="module")
def fits(records):
    return fits_frame(records)


def test_frames_have_a_row_per_run_and_per_matrix(records, runs, fits):
    assert len(runs) == len(records) and len(fits) == sum(len(r.fits) for r in records)
    whole = fits[fits["signature"] == runs.loc[runs["matrices"] == 210, "signature"].iloc[0]]
    assert set(whole["layer"]) == set(range(30))
    assert set(whole["kind"]) == {f"self_attn.{k}_proj" for k in "qkvo"} | {f"mlp.{k}_proj" for k in ("gate", "up", "down")}


def test_tables_of_a_model_that_nobody_retrained_are_empty(runs):
    assert retrained(runs, "llama7b", PERPLEXITY).empty and adaptive_or_not(runs, "llama7b", PERPLEXITY).empty


def test_the_figure_of_what_is_left_has_a_column_per_layer_of_any_model():
    for names in (["model.decoder.layers.0.fc1", "model.decoder.layers.0.self_attn.k_proj"], ["layers.0.blocks.1.mlp.fc2"]):
        fits = [FitRecord.model_construct(name=n.replace("0", str(i)), shape=(3, 4), kept=6) for n in names for i in range(3)]
        axis = kept_by_matrix(fits).axes[0]
        assert len(axis.get_xticks()) == 3 and len(axis.get_yticks()) == len(names)


def test_a_cell_is_empty_where_nothing_was_run(runs):
    table = by_ratio(runs, "smollm2_135m", PERPLEXITY)
    assert table.loc["SVD", 0.0] == pytest.approx(20.617, abs=1e-3)
    assert table.isna().any(axis=None) and not table.isna().all(axis=None)


def test_adaptive_stands_beside_uniform_with_the_same_settings_over_seeds():
    row = {
        "model": "small",
        "method": "svd",
        "kernel": "",
        "select": "layers",
        "changed": "",
        "ratio": 0.5,
        "retraining": "text",
    }
    row |= {"retrain_steps": 8, "tokens": 64, "samples": 8, "retrain_seconds": 1.0, f"dense.{PERPLEXITY}": 5.0}
    ends = {("uniform", 8): [10.0, 14.0], ("adaptive b0=2", 8): [9.0, 11.0, 13.0], ("uniform", 9): [1.0]}
    made_up = [
        {**row, "budget": budget, "retrain_steps": steps, "seed": seed, f"retrained.{PERPLEXITY}": end}
        for (budget, steps), found in ends.items()
        for seed, end in enumerate(found)
    ]
    table = adaptive_or_not(pd.DataFrame(made_up), "small", PERPLEXITY)
    ((index, found),) = table.iterrows()
    assert index == (0.5, "SVD", "text", 8, "adaptive b0=2")
    assert found[["mean adaptive", "std adaptive", "count adaptive"]].tolist() == [11.0, 2.0, 3]
    assert found[["mean uniform", "count uniform", "adaptive - uniform"]].tolist() == [12.0, 2, -1.0]


def test_accuracies_have_the_dense_model_first(runs):
    table = accuracy(runs, "swin_micro", "imagenet.digits")
    row = runs[(runs["model"] == "swin_micro") & (runs["method"] == "svd") & (runs["ratio"] == 0.9)].iloc[0]
    assert table.index[0] == (0.0, "dense") and table["top1"].iloc[0] == row["dense.imagenet.digits.top1"]
    assert table.loc[(0.9, "SVD"), "top1"] == row["compressed.imagenet.digits.top1"] < table["top1"].iloc[0]


def with_standard_errors(record: RunRecord) -> RunRecord:
    """A record as it is now: with a standard error beside the first metric of each data set."""
    metrics = {
        stage: {
            task: {data: {**figures, f"{next(iter(figures))}_stderr": 0.5} for data, figures in sets.items()}
            for task, sets in tasks.items()
        }
        for stage, tasks in record.metrics.items()
    }
    return record.model_copy(update={"metrics": metrics})


def test_a_standard_error_stands_beside_its_metric_and_is_no_metric_and_older_records_have_none(records):
    of_text = [r for r in records if "sotu" in r.metrics["dense"].get("language_modelling", {})]
    older = [r for r in of_text if "perplexity_stderr" not in r.metrics["dense"]["language_modelling"]["sotu"]]
    newer = [with_standard_errors(r) for r in older]
    assert (runs_frame(newer)[f"dense.{PERPLEXITY}_stderr"].dropna() == 0.5).all()
    for model in ("smollm2_135m", "opt_micro"):
        pd.testing.assert_frame_equal(
            by_ratio(runs_frame(newer), model, PERPLEXITY), by_ratio(runs_frame(older), model, PERPLEXITY)
        )
    evaluated_by = evaluated("compressed", "perplexity")
    for before, after in zip(older, newer, strict=True):
        known, shown = metric_rows(before), metric_rows(after)
        assert [row[:5] for row in shown] == [row[:5] for row in known] and {row[5] for row in known} == {None}
        assert {row[3]: row[5] for row in shown if row[5]} == {"perplexity": 0.5} and evaluated_by(before) == evaluated_by(
            after
        )
        assert summary(after).items() - summary(before).items() == {(f"perplexity_stderr/{s}", 0.5) for s in after.metrics}


def test_the_figure_has_a_panel_per_kind_of_matrix(fits):
    figure = loss_by_layer(fits[(fits["ratio"] == 0.7) & (fits["matrices"] == 210)])
    assert len([axis for axis in figure.axes if axis.get_visible()]) == 7


def test_runs_that_differ_in_a_setting_have_lines_of_their_own_and_the_reference_has_one(fits):
    whole = fits[(fits["ratio"] == 0.7) & (fits["matrices"] == 210)]
    one = whole[whole["kernel"] == "piecewise"].drop_duplicates(["name"])
    other = one.assign(signature="other", changed="steps=5", relative_error=one["relative_error"] + 0.1)
    reference = one.assign(signature="svd", method="svd", kernel="linear", relative_error=one["svd_error"])
    axis = loss_by_layer(pd.concat([one.assign(changed=""), other, reference])).axes[0]
    drawn = {line.get_label(): len(line.get_xdata()) for line in axis.get_lines()}
    names = {"SVD, equal parameters", "piecewise", "piecewise steps=5", "floor of piecewise"}
    assert set(drawn) == names and set(drawn.values()) == {30}


def test_forms_of_the_forward_are_compared_on_equal_terms():
    torch.manual_seed(0)
    table = compare_forms(Piecewise(r=4), 256, 192, 0.7, 32).set_index("form")
    assert table.loc["apply", "training_extra_bytes"] < table.loc["reconstruct", "training_extra_bytes"]
    assert table.loc["dense", "training_extra_bytes"] == 0


def test_a_table_of_costs_has_the_dense_model_first_and_a_row_per_kernel_and_form(run_here):
    asked = ["model=tiny_llama", "track=none", "task=forward_cost", "task.length=8", "task.repeats=1", "solver.steps=0"]
    rows = (["kernel=linear"], ["kernel=piecewise"], ["kernel=piecewise", "forward=reconstruct"])
    runs = runs_frame([run_here(*asked, "solver.start=random", *row) for row in rows])
    table = forward_cost(runs, "tiny_llama", "sotu", 0.7, tokens=8)
    assert table.index[0] == ("dense", "", "") and set(table.index[1:]) == {
        ("nla", "linear", "triplets"),
        ("nla", "piecewise", "triplets"),
        ("nla", "piecewise", "reconstruct"),
    }
    memory = table["training MB"].xs("piecewise", level="kernel").droplevel("method")
    assert memory["triplets"] < memory["reconstruct"] and table["inference s"].iloc[1:].is_monotonic_increasing
    assert forward_cost(runs, "tiny_llama", "sotu", 0.7, tokens=512).empty


def test_runs_by_bits_are_named_by_method_storage_and_training_and_drawn_by_what_they_cost():
    metric, decode = "language_modelling.sotu.perplexity", "compressed.latency.decode_1."
    retrained = {"retrain_steps": 4, f"retrained.{metric}": 60.0, f"retrained.{metric}_stderr": 0.25}
    latency = {f"{decode}to_dense": 0.9, f"{decode}parameter_bytes_per_token": 4e6}

    def row(method, kernel, storage, bits, taken, value, **others):
        found = {"method": method, "kernel": kernel, "storage": storage, "bits": bits, "selected_per_weight": taken}
        usual = {"model": "m", "matrices": 70, "changed": "", "retrain_steps": 0, "weighted_error": 0.1, "fit_seconds": 1.0}
        usual["operations"] = taken / 2
        figures = {f"dense.{metric}": 20.0, f"compressed.{metric}": value, f"compressed.{metric}_stderr": 0.5}
        return usual | found | figures | {f"retrained.{metric}": None} | others

    runs = pd.DataFrame(
        [
            row("nla", "phase", "angles", 2.05, 2.04, 30.0),
            row("gptq", "int2", "float", 2.3, 2.28, 40.0),
            row("gptq", "int2", "float", 2.3, 2.28, 35.0, changed="refine=block"),
            row("svd_llm", "factors", "int4", 1.05, 1.04, 80.0, **retrained),
            row("svd_llm", "linear", "float", None, 8.0, 50.0),  # asked for a ratio
            row("nla", "phase", "angles", 2.05, 2.04, None, **latency),
        ]
    )
    table = tables.by_bits(runs, "m", metric)
    (timed,) = tables.with_latency(table, runs, "m").reset_index().to_dict("records")
    final = table.loc[(70, "retraining", "SVD-LLM, int4", 1.05)]
    assert pd.isna(final["operations"]) and final["stderr"] == 0.25
    assert (timed["method"], timed["figure"], timed["token"], timed["read"]) == ("phase, angles", 30.0, 0.9, 4.0)
    assert table["figure"].to_dict() == {
        (70, "fits", "GPTQ", 2.3): 40.0,
        (70, "fits", "phase, angles", 2.05): 30.0,
        (70, "refinement", "GPTQ", 2.3): 35.0,
        (70, "retraining", "SVD-LLM, int4", 1.05): 60.0,
    }
    assert table.loc[(70, "fits", "phase, angles", 2.05), "times"] == 1.5
    for cost, share in (("bits taken", 1), ("operations", 2)):
        axis = plots.by_cost(table.xs("fits", level="after"), cost, "what it costs", [1, 2]).axes[0]
        drawn = {c.get_label(): c.lines[0].get_xdata().tolist() for c in axis.containers}
        assert drawn == {"GPTQ": [2.28 / share], "phase, angles": [2.04 / share]}


def test_fits_in_few_and_in_many_steps_stand_in_one_line_a_method():
    usual = {"model": "m", "select": "s", "retrain_steps": 0, "tasks": "language_modelling", "ratio": 0.5}

    def fit(method, kernel, steps, changed, weighted, seconds):
        figures = {"weighted_error": weighted, "svd_llm_error": 0.4, "seconds": seconds, "flops": 10 * steps}
        row = {"method": method, "kernel": kernel, "changed": changed, "signature": f"{method} {changed}"}
        return usual | row | figures | {"steps": steps}

    fits = pd.DataFrame(
        [
            fit("hybrid", "linear+harmonic", 50, "steps=50 windows=256 storage=scaled", 0.2, 1.0),
            fit("hybrid", "linear+harmonic", 50, "steps=50 windows=256 storage=scaled", 0.1, 2.0),
            fit("hybrid", "linear+harmonic", 200, "windows=256 storage=scaled", 0.04, 8.0),
            fit("hybrid", "linear+harmonic", 200, "lr=0.4 windows=256 storage=scaled", 0.08, 8.0),
            fit("svd_llm", "linear", 0, "windows=256", 0.4, 0.1),
        ]
    )
    table = tables.error_by_steps(fits, "m", "s")
    named = [("hybrid harmonic", 50), ("hybrid harmonic", 200), ("hybrid harmonic (lr=0.4)", 200)]
    assert table.index.tolist() == [(0.5, *row) for row in named]
    few = table.loc[(0.5, "hybrid harmonic", 50)]
    assert few["to_svd_llm"] == pytest.approx((0.5 + 0.25) / 2) and few["seconds"] == 3 and few["matrices"] == 2
    left, right = plots.error_by_cost(table.loc[0.5]).axes
    drawn = {line.get_label(): list(line.get_xdata()) for line in left.get_lines()}
    assert drawn["hybrid harmonic"] == [3.0, 8.0] and drawn["hybrid harmonic (lr=0.4)"] == [8.0]
    assert list(right.get_lines()[0].get_xdata()) == [1000, 2000]


def test_a_refined_run_stands_beside_the_run_with_equal_settings_and_without_refinement():
    usual = {"model": "m", "select": "layers", "retrain_steps": 0, "tasks": "language_modelling", "budget": "uniform"}
    metric = "language_modelling.sotu.perplexity"

    def row(method, ratio, changed, value, **others):
        figures = {f"dense.{metric}": 20.0, f"compressed.{metric}": value}
        return usual | {"method": method, "kernel": "phase", "ratio": ratio, "changed": changed} | others | figures

    runs = pd.DataFrame(
        [
            row("svd_llm", 0.5, "windows=88", 400.0),
            row("svd_llm", 0.5, "windows=88 refine=block", 70.0),
            row("svd_llm", 0.7, "windows=88", 800.0),  # refined at another ratio only
            row("svd_llm", 0.5, "", 500.0),  # other statistics
            row("nla", 0.5, "loss=activation windows=88 budget=marginal refine=block", 45.0, budget="marginal"),
            row("nla", 0.7, "loss=activation windows=88", 900.0),  # never refined
        ]
    )
    table = tables.refined(runs, "m", metric)
    assert table.loc[(0.5, "uniform", "SVD-LLM (windows=88)")].tolist() == [20.0, 400.0, 70.0, 50.0]
    alone = table.loc[(0.5, "marginal", "NLA phase (loss=activation windows=88)")]
    assert math.isnan(alone["fitted"]) and alone["excess"] == 25.0 and len(table) == 3
    axis = plots.refined(table).axes[0]
    drawn = {line.get_label(): list(line.get_ydata()) for line in axis.get_lines()}
    assert drawn["SVD-LLM, refined"][0] == 70.0 and drawn["SVD-LLM, fitted only"] == [400.0, 800.0]
    assert drawn["NLA phase, marginal budget, refined"] == [45.0] and "NLA phase, marginal budget, fitted only" not in drawn
