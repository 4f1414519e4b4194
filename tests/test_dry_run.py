"""Tests of `dry_run=true`: the plan that it prints, and how it measures the machine's speed."""

import itertools
import re
from threading import Barrier

import pytest
import torch

from nla.harness import estimate_fits
from nla.harness.request import prepare
from nla.harness.settings import check_settings
from nla.methods.svd_llm import SVDLLM
from nla.pipeline import run
from tests.conftest import QUANTISED, TINY, configuration, options, records


@pytest.mark.parametrize("model", options("model"))
def test_a_dry_run_prints_the_plan_of_any_model_without_weights(tmp_path, caplog, monkeypatch, of_model, model):
    caplog.set_level("INFO")
    monkeypatch.setattr(estimate_fits, "LARGEST", 128)  # the machine's speed is measured quickly
    cfg = configuration(*of_model(model), "dry_run=true", "ratio=0.7", f"outputs_dir={tmp_path}")
    assert run(check_settings(cfg)) is None
    for text in ("matrix", "shape", "FLOP/s measured", "a step of all fits", "bytes of the model", "Nothing was fitted"):
        assert text in caplog.text
    assert max(len(line) for message in caplog.messages for line in message.splitlines()) <= 80
    assert not records(tmp_path)


def test_the_plan_of_any_method_fits_a_terminal_of_80_columns(tmp_path, caplog, monkeypatch):
    caplog.set_level("INFO")
    monkeypatch.setattr(estimate_fits, "LARGEST", 128)
    asked = ["model=smollm2_135m", "dry_run=true", "budget=marginal", "track=none", f"outputs_dir={tmp_path}"]
    for method in options("method"):
        size = "bits=3.3" if method in QUANTISED else "ratio=0.5"
        assert run(check_settings(configuration(*asked, size, f"method={method}"))) is None
    assert max(len(line) for message in caplog.messages for line in message.splitlines()) <= 80
    for said in ("keeping at most", "These are equal shares"):
        assert caplog.text.count(said) == len(options("method"))


@pytest.mark.parametrize("method", ["svd_llm", "hybrid", "pifa", "gptq", "quip"])
def test_the_plan_of_a_refinement_has_its_operations_and_its_time(tmp_path, caplog, method):
    caplog.set_level("INFO")
    size = "bits=4.5" if method in QUANTISED else "ratio=0.5"
    asked = [*TINY, "dry_run=true", "refine=block", "refine.batch=64", size, f"method={method}", f"outputs_dir={tmp_path}"]
    assert run(check_settings(configuration(*asked))) is None
    assert re.search(r"refinement +[\d.]+ .?FLOP in the selected layers, for [\d,]+ tokens\n\.\.\. takes +about ", caplog.text)


def test_a_dry_run_measures_starts_of_which_nothing_is_known_yet(monkeypatch):
    begun, start = [], SVDLLM.start

    def noted(self, objective, planned, generator):
        begun.append(objective)
        return start(self, objective, planned, generator)

    monkeypatch.setattr(SVDLLM, "start", noted)
    prepared = prepare(check_settings(configuration(*TINY, "method=svd_llm", "ratio=0.5")))
    estimate_fits.measured_rates(prepared, prepared.method)
    assert len({id(objective) for objective in begun}) == len(begun) > 1  # an objective keeps its spectrum


def test_a_dry_run_measures_a_term_of_the_same_size_whatever_the_models_type():
    sizes = []
    for dtype in ("float32", "bfloat16"):
        prepared = prepare(check_settings(configuration(*TINY, "solver.steps=10", "ratio=0.7", f"dtype={dtype}")))
        sizes.append(estimate_fits.measured_term(prepared, prepared.method).count())
    assert sizes[0] == sizes[1] > 0


@pytest.mark.parametrize("threads", [1, 3])
def test_a_dry_run_gives_every_worker_something_to_do(threads):
    calls, together, before = itertools.count(), Barrier(threads), torch.get_num_threads()

    def work(_: int) -> None:
        if next(calls):  # not the warm-up
            together.wait(timeout=60)  # a call that the others never join fails

    torch.set_num_threads(threads)
    try:
        assert estimate_fits.rate(work, 1, torch.device("cpu")) > 0
    finally:
        torch.set_num_threads(before)
