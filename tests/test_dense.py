"""A matrix that a budget gives all its bits stays as it is: through the fit, refinement, the saved folder and inference."""

import json

import pytest
import torch
from torch import nn

import nla
from analysis.settings import kernel_name
from nla.methods.svd import SVD
from nla.terms.dense import Dense
from nla.terms.state import empty_term, pack, unpack
from tests.conftest import make_model
from tests.samples import compress, normal


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_with_all_its_bits_a_matrix_is_kept_bit_for_bit_and_with_one_less_it_is_not(dtype):
    weight, width = 3 * normal(7, 11).to(dtype), 8 * dtype.itemsize
    fit = compress(SVD(), weight, width)
    assert isinstance(fit.term, Dense) and torch.equal(fit.term.dense(), weight)
    assert (fit.bits, fit.n_params, fit.status, fit.relative_error, fit.floor) == (width * 77, 77, "dense", 0, 0)
    assert compress(SVD(), weight, width - 1 / 77).term.describe().startswith("linear")


def test_a_dense_term_is_a_term_like_any_other():
    term, x = Dense(normal(7, 11)), normal(2, 3, 11, seed=1)
    restored = unpack(*pack({"w": term}))["w"]
    assert torch.equal(restored.dense(), term.dense()) and restored.config() == term.config()
    assert empty_term(term.config()).bits() == term.bits() == 32 * 77 and term.factors() is term.wide_factors() is None
    torch.testing.assert_close(term(x), x @ term.dense().T)
    torch.testing.assert_close(term.scaled(-2.0).dense(), -2 * term.dense())
    assert term.forward_flops(5) == 2 * 5 * 77 and term.as_stored(torch.bfloat16).bits() == 16 * 77


def test_a_run_keeps_it_through_refinement_saving_and_inference(run_here, tmp_path):
    few = ["task.window=64", "task.max_windows=1", "track=none", "statistics.windows=80", "statistics.length=32"]
    best = ["method=svd_llm", "budget=marginal", "ratio=0.1", "refine=block", "refine.epochs=1"]
    record = run_here("model=tiny_llama", *best, *few, f"save={tmp_path / 'kept'}")
    kept = [fit.name for fit in record.fits if fit.status == "dense"]
    assert kept and len(kept) < len(record.fits) and record.parameters.ratio >= 0.1
    assert kernel_name(record) == "linear"  # which finds the runs with equal settings
    dense, model = make_model("tiny_llama", tmp_path / "cache").module, nla.load_compressed(tmp_path / "kept")
    for name in kept:
        assert torch.equal(model.get_submodule(name).term.dense(), dense.get_submodule(name).weight)
    nla.optimise_for_inference(model)
    assert all(isinstance(model.get_submodule(name), nn.Linear) for name in kept)


def test_a_linear_term_is_paid_for_by_all_matrices_so_that_the_dense_ones_stay_dense(run_here):
    few = ["task.window=64", "task.max_windows=1", "track=none", "statistics.windows=80", "statistics.length=32"]
    added = ["retrain=lora", "retrain.steps=1", "retrain.linear_term=1", "retrain.length=64", "retrain.watch=0"]
    record = run_here("model=tiny_llama", "method=svd_llm", "budget=marginal", "ratio=0.2", *added, *few)
    dense = [fit for fit in record.fits if fit.status == "dense"]
    assert dense and all(fit.fitted == fit.shape[0] * fit.shape[1] for fit in dense)
    assert 0.2 <= record.parameters.ratio < 0.23


def test_a_block_whose_matrices_all_stay_dense_needs_no_refinement_of_triplets(run_here, tmp_path):
    few = ["task.window=64", "task.max_windows=1", "track=none", "statistics.windows=80", "statistics.length=32"]
    one = ["method=svd_llm", "budget=marginal", "ratio=0.02", "refine=block", "refine.epochs=1", "refine.train=triplets"]
    record = run_here("model=tiny_llama", *one, *few)
    (compressed,) = [fit.name for fit in record.fits if fit.status != "dense"]
    lines = (tmp_path / "runs" / record.name / "refine.jsonl").read_text().splitlines()
    assert len(lines) == 2
    for block in map(json.loads, lines):
        mine = compressed.startswith(f"{block['block']}.")
        assert (block["trained"] > 0, block["steps"] > 0) == (mine, mine)
        assert mine or block["before"] == block["after"] < 1e-6
