"""Tests of the two forms of the forward pass, and of the task that measures seconds and memory of the whole model."""

import pytest
import torch
from torch import nn

from nla.compressed.layer import LAYERS
from nla.harness.estimate_fits import estimate
from nla.harness.request import prepare
from nla.harness.settings import check_settings
from nla.machine.cache import Cache
from nla.machine.errors import UserError
from nla.models.base import VisionModel
from nla.terms.kernel_term import KernelTerm
from tasks.forward_cost import ForwardCost
from tests.conftest import SHORT, TINY, configuration, figures, only_folder, only_record, options, records

COST = ["model=tiny_llama", "track=none", "task=forward_cost", "task.length=8", "task.repeats=1", "ratio=0.5"]
RANDOM = ["solver.start=random", "solver.steps=0"]


def cost(record, stage: str = "compressed") -> dict[str, float]:
    (found,) = record.metrics[stage]["forward_cost"].values()
    return found


def test_reconstructing_computes_the_same_outputs_and_gradients_as_the_triplets(kernel):
    generator = torch.Generator().manual_seed(0)
    term = KernelTerm(kernel, kernel.random_start(13, 9, 4, 2, generator))
    bias, x = nn.Parameter(torch.randn(13, generator=generator)), torch.randn(2, 3, 9, generator=generator)
    found = {}
    for form, kind in LAYERS.items():
        layer = kind(term, bias)
        y = layer(x)
        found[form] = [y, *torch.autograd.grad(y.square().sum(), [bias, *term.parameters()])]
    for one, other in zip(*found.values(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


def test_without_algorithm_1_the_whole_model_needs_more_memory_and_computes_the_same(run_here, tmp_path):
    both = [*COST, *RANDOM, "task=[language_modelling,forward_cost]", "task.window=64", "task.max_windows=1"]
    runs = [run_here(*both, f"forward={form}") for form in LAYERS]
    triplets, reconstruct = map(cost, runs)
    for figure in ("inference_peak_bytes", "training_peak_bytes"):
        assert triplets[figure] < reconstruct[figure]
    assert triplets["resident_bytes"] == reconstruct["resident_bytes"] < cost(runs[0], "dense")["resident_bytes"]
    nll = [run.metrics["compressed"]["language_modelling"]["sotu"]["nll"] for run in runs]
    assert nll[0] == pytest.approx(nll[1], rel=1e-4)
    journals = list((tmp_path / "cache" / "windows").glob("*.jsonl"))
    assert len(journals) == 3  # of the dense model, and of each form
    assert runs[0].metrics["dense"]["language_modelling"] == runs[1].metrics["dense"]["language_modelling"]
    assert [fit.relative_error for fit in runs[0].fits] == [fit.relative_error for fit in runs[1].fits]
    assert len({record["signature"] for record in records(tmp_path)}) == 2


def test_a_retraining_without_algorithm_1_takes_the_same_steps(run_here):
    runs = [
        run_here(*SHORT, "kernel=piecewise", "solver.start=random", "retrain.steps=3", f"forward={form}") for form in LAYERS
    ]
    losses = [[row["loss"] for row in run.history if "loss" in row] for run in runs]
    assert len(losses[0]) >= 3 and losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert runs[0].peak_bytes["retrain"] < runs[1].peak_bytes["retrain"]


@pytest.mark.parametrize("kernel", options("kernel"))
def test_the_cost_of_every_kernel_is_measured_without_a_fit(run_here, kernel):
    record = run_here(*COST, *RANDOM, f"kernel={kernel}")
    assert all(fit.steps == 0 for fit in record.fits)
    for stage in ("dense", "compressed"):
        found = cost(record, stage)
        for work in ("inference", "training"):
            fastest, median, slowest = (found[f"{work}_seconds{end}"] for end in ("_fastest", "", "_slowest"))
            assert 0 < fastest <= median <= slowest
        assert found["training_peak_bytes"] > found["resident_bytes"] and found["tokens"] == 8 * found["windows"] == 8
        assert record.peak_bytes[stage] == found["training_peak_bytes"] > found["inference_peak_bytes"]


def test_all_figures_but_the_seconds_are_the_same_in_every_run(run_here, tmp_path):
    found = []
    for _ in range(2):
        run_here(*COST, *RANDOM)
        found.append(only_record(tmp_path))
        (only_folder(tmp_path) / "record.json").unlink()
    assert figures(found[0]) == figures(found[1])
    seconds, again = (record["metrics"]["compressed"]["forward_cost"]["sotu"]["inference_seconds"] for record in found)
    assert seconds != again  # measured, not taken from the cache


def test_peaks_of_a_linear_classifier_by_hand(tmp_path):
    data = check_data("model=tiny_swin", "task=forward_cost")
    module = nn.Sequential(nn.Flatten(), nn.Linear(64, 10, bias=False))
    module.requires_grad_(False)  # as retraining leaves the parameters that it does not train
    model = VisionModel(module, lambda image: torch.ones(1, 8, 8))
    (found,) = ForwardCost(data, samples=4, length=2, repeats=1, seed=0).evaluate(model, Cache(tmp_path), "", "").values()
    logits = 4 * 4 * 10
    assert found["inference_peak_bytes"] == logits
    assert found["training_peak_bytes"] >= 4 * 64 * 10 + logits  # the gradient of the weight, and the gradient of the logits
    assert found["images"] == 4 and found["resident_bytes"] == 4 * 64 * 10
    assert not any(p.requires_grad for p in module.parameters())


def check_data(*overrides: str):
    from hydra.utils import instantiate

    return instantiate(configuration(*overrides).task.forward_cost).data


def test_images_are_read_together_by_a_swin(run_here):
    record = run_here("model=tiny_swin", "track=none", "task=forward_cost", "task.samples=3", *RANDOM)
    assert cost(record)["images"] == 3 and "tokens" not in cost(record)


def test_a_dry_run_counts_the_operations_of_the_chosen_form(tmp_path):
    asked = [*TINY, "kernel=linear", "ratio=0.5", f"outputs_dir={tmp_path}"]
    forms = {form: prepare(check_settings(configuration(*asked, f"forward={form}"))) for form in LAYERS}
    matrices = forms["triplets"].plan.matrices
    extra = sum(2 * m.term.triplets.h * m.spec.n_params for m in matrices) / 512  # W' is made once for 512 tokens
    assert estimate(forms["reconstruct"]).forward == pytest.approx(2 * forms["triplets"].plan.selected + extra)
    thin = sum(2 * m.term.triplets.h * (m.spec.out_features + m.spec.in_features) for m in matrices)
    assert estimate(forms["triplets"]).forward == pytest.approx(thin)


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["forward=dense"], "forward=dense is not allowed.*'triplets' or 'reconstruct'"),
        (["task.repeats=0"], r"task\.repeats=0 must be a whole number from 1"),
        (["task.length=4096"], r"task\.length=4096 is longer than the 2048 tokens"),
        (["data=everyday"], "task=forward_cost needs text or images"),
        (["data=digits"], "data=digits holds images, the model reads text; choose data=sotu"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_measurement_that_cannot_be_made_is_refused_in_words(run_here, arguments, expected):
    with pytest.raises(UserError, match=expected):
        run_here(*COST, *arguments)
