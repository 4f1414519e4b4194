"""Tests of the experiments (tables of the paper): every row is a valid request, and its small twin sweeps the same."""

import itertools
from functools import cache

import pytest
import torch
from hydra import compose
from hydra.utils import get_class

from analysis.composed import hydra_of_conf
from nla.harness.estimate_retraining import retraining_cost
from nla.harness.fits_table import parse_terms
from nla.harness.request import prepare
from nla.harness.settings import check_settings
from nla.machine.cache import Cache
from tests.conftest import CONF, TINY, configuration, options, records

PAPERS = ("llama7b", "opt_1_3b", "swin_base")
TWINS = {"llama7b": "smollm2", "opt_1_3b": "opt_small", "swin_base": "swin_micro_fashion"}


@pytest.fixture(scope="module")
def cache_dir(tmp_path_factory):
    return tmp_path_factory.mktemp("inventories")


@cache
def rows(experiment: str) -> list[list[str]]:
    """The overrides of every row that `python run.py experiment=...` runs."""
    with hydra_of_conf():
        hydra = compose("config", overrides=[f"experiment={experiment}"], return_hydra_config=True).hydra
    swept = dict(hydra.sweeper.params or {})
    assert not swept or hydra.mode.name == "MULTIRUN"
    choices = [[f"{key}={value}" for value in str(values).split(",")] for key, values in swept.items()]
    return [list(row) for row in itertools.product(*choices)]


@pytest.mark.parametrize("experiment", options("experiment"))
def test_every_row_of_an_experiment_is_a_request_that_can_be_met(experiment, cache_dir):
    comment = (CONF / "experiment" / f"{experiment}.yaml").read_text().splitlines()[1]
    assert comment.startswith("# ")
    plans = set()
    for row in rows(experiment):
        settings = check_settings(configuration(f"experiment={experiment}", *row, f"cache_dir={cache_dir}"))
        request = prepare(settings)
        assert request.plan.matrices
        plans.add(str([(key, settings[key]) for key in ("ratio", "bits", "method", "budget", "data", "forward")]))
    assert len(plans) == len(rows(experiment))


@pytest.mark.parametrize("experiment", [name for name in options("experiment") if name.endswith(PAPERS)])
def test_an_experiment_of_the_papers_model_has_a_twin_that_sweeps_the_same(experiment):
    model = next(name for name in PAPERS if experiment.endswith(name))
    twin = experiment.removesuffix(model) + TWINS[model]
    ours, theirs = ({tuple(o for o in row if "data=" not in o) for row in rows(name)} for name in (experiment, twin))
    assert ours == theirs
    steps = [configuration(f"experiment={e}").retrain.steps for e in (experiment, twin)]
    assert bool(steps[0]) == bool(steps[1])


def test_an_experiment_is_a_sweep_by_itself_and_its_rows_can_be_chosen(cli):
    result = cli("experiment=adaptive_opt_small", "dry_run=true", "budget=adaptive")
    assert result.stdout.count("Nothing was fitted") == 1 and "retraining tightens them" in result.stdout
    assert "... takes" in result.stdout and "NVIDIA A100" in result.stdout
    result = cli("experiment=adaptive_opt_small", "dry_run=true")
    assert result.stdout.count("Nothing was fitted") == 2
    assert max(map(len, [line for line in result.stdout.splitlines() if not line.startswith("\t#")])) <= 80


def test_the_cost_of_a_retraining_by_hand(tmp_path):
    arguments = ["retrain.steps=3", "retrain.length=16", "kernel=linear", "ratio=0.5", f"outputs_dir={tmp_path}"]
    request = prepare(check_settings(configuration(*TINY, *arguments)))
    cost = retraining_cost(request)
    assert cost.tokens == 3 * 4 * 16 and cost.samples == 12
    factors = sum(2 * 16 * e.term.triplets.h * (e.spec.out_features + e.spec.in_features) for e in request.plan.matrices)
    head = 2 * 16 * 256 * 48
    attention = 2 * 2 * 2 * 16 * 16 * 48  # layers, products, multiply and add, tokens^2, width
    assert cost.forward == factors + head + attention
    assert cost.flops == 12 * 3 * cost.forward
    triplets = sum(request.plan.kept.values())
    assert (cost.optimiser_bytes, cost.gradient_bytes, cost.importance_bytes) == (8 * triplets, 8 * triplets, 0)
    again = prepare(check_settings(configuration(*TINY, *arguments, "retrain.recompute=true", "dtype=bfloat16")))
    assert retraining_cost(again).flops == 12 * 4 * cost.forward
    assert retraining_cost(again).weights_bytes == cost.weights_bytes // 2 + 4 * triplets
    lora = prepare(
        check_settings(configuration(*TINY, *arguments, "retrain=lora", "retrain.linear_term=2", "retrain.logits=1"))
    )
    terms = sum(2 * (e.spec.out_features + e.spec.in_features + 1) for e in lora.plan.matrices)
    assert retraining_cost(lora).optimiser_bytes == 8 * terms
    assert retraining_cost(lora).weights_bytes > 4 * (2 * lora.inventory.parameters - lora.plan.selected)
    shared = prepare(check_settings(configuration(*TINY, *arguments, "retrain.processes=4", "dtype=bfloat16")))
    part = retraining_cost(shared)
    assert (part.optimiser_bytes, part.gradient_bytes) == (2 * triplets, 3 * triplets) and part.flops == cost.flops
    tightened = prepare(check_settings(configuration(*TINY, *arguments, "budget=adaptive", "schedule.t_f=0.6")))
    part = retraining_cost(tightened)
    assert part.importance_bytes == part.optimiser_bytes > 1.4 * cost.optimiser_bytes
    assert part.flops / 12 / 3 == pytest.approx(part.forward / 3 + 2 * cost.forward / 3, rel=0.02)  # cool-down: 2 of 3 steps


def test_an_images_rows_are_counted_layer_by_layer(tmp_path):
    from timm import create_model
    from torch.utils.flop_counter import FlopCounterMode

    request = prepare(check_settings(configuration("model=tiny_swin", "retrain.steps=2", f"outputs_dir={tmp_path}")))
    cost = retraining_cost(request)
    architecture = dict(request.model.configuration(Cache(tmp_path)))
    dense = create_model(architecture.pop("model"), **architecture).eval()
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        dense(torch.zeros(1, 1, 16, 16))
    assert cost.tokens is None and cost.samples == 128
    assert 0.3 * counter.get_total_flops() < cost.forward < counter.get_total_flops()


@pytest.mark.parametrize("model", ["llama7b", "llama13b", "llama2_7b", "llama3_8b", "opt_125m", "opt_1_3b", "opt_6_7b"])
def test_a_published_language_model_is_measured_on_the_papers_data_by_default(tmp_path, model):
    """All of WikiText-2's test split, with its training split for calibration and retraining; or the seven questions."""
    asked = [f"model={model}", "method=svd_llm", "retrain.steps=1", f"outputs_dir={tmp_path}"]
    request = prepare(check_settings(configuration(*asked)))
    (task,) = request.tasks
    assert (task.name, task.data.name, task.data.split, task.max_windows) == ("language_modelling", "wikitext2", "test", None)
    for data in (request.calibration, request.retraining.data):
        assert (data.name, data.split) == ("wikitext2", "train")
    (task,) = prepare(check_settings(configuration(*asked, "task=commonsense"))).tasks
    assert task.data.name == "commonsense"
    (task,) = prepare(check_settings(configuration(*asked, "data=sotu", "task.max_windows=8"))).tasks
    assert (task.data.name, task.max_windows) == ("sotu", 8)


SMALL = [
    "model=tiny_llama",
    "track=none",
    "statistics.windows=4",
    "statistics.length=32",
    "task.window=64",
    "task.max_windows=2",
]


def test_the_twins_perplexity_is_measured_on_local_files_of_the_papers_texts(cli, tmp_path):
    (tmp_path / "wiki.test.raw").write_text(" = Title = \n Text of it . \n" * 10)
    (tmp_path / "ptb.test.txt").write_text("the other text without capitals\n" * 10)
    cli("experiment=perplexity_texts_smollm2", *SMALL, "ratio=0.5", "method=svd", f"data.path={tmp_path}")
    measured = [record["metrics"]["compressed"]["language_modelling"] for record in records(tmp_path)]
    found = {name: figures for sets in measured for name, figures in sets.items()}
    assert set(found) == {"wikitext2", "ptb"} and found["ptb"]["nll"] != found["wikitext2"]["nll"]
    assert all(figures["windows"] == 2 and figures["perplexity"] > 1 for figures in found.values())


def test_nla_in_the_activation_norm_is_a_row_of_the_retrained_experiment(run_here):
    """It is retrained with the budget, the rate and the data of SVD-LLM, and as many parameters are left."""
    few = [*SMALL, "ratio=0.5", "budget=adaptive", "retrain.steps=4", "retrain.length=32", "retrain.watch=0", "solver.steps=5"]
    rows = (["method=svd_llm"], ["method=nla", "method.loss=activation"])
    svd_llm, nla = (run_here("experiment=retrained_smollm2", *few, *row) for row in rows)
    assert nla.config["retrain"] == svd_llm.config["retrain"] and nla.config["budget"] == svd_llm.config["budget"]
    assert nla.retraining.tokens == svd_llm.retraining.tokens
    rates = [get_class(record.config["method"].get("kernel", {"_target_": LINEAR})["_target_"]) for record in (svd_llm, nla)]
    assert rates[0].training_rate == rates[1].training_rate
    left = [record.parameters.selected_after / record.parameters.selected_before for record in (svd_llm, nla)]
    assert max(left) <= 0.5 and min(left) > 0.45
    assert all(fit.weighted_error is not None for fit in nla.fits)


LINEAR = "nla.kernels.linear.Linear"  # of svd_llm, whose kernel is no setting


@pytest.mark.parametrize("kernel", ["piecewise", "phase"])
def test_r_20_is_fitted_as_it_is_asked_for(run_here, kernel):
    few = [*SMALL, r"select.include='layers\.0\.mlp'", "ratio=0.3", "solver.steps=5"]
    record = run_here("experiment=rank_smollm2", *few, f"kernel={kernel}", "kernel.r=20")
    assert {parse_terms(fit.terms)[0].r for fit in record.fits} == {20}
    assert all(fit.floor <= fit.relative_error for fit in record.fits)
