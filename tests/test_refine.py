"""Block refinement trains the terms of a block on the block's outputs, behind the compressed blocks before it."""

import json
import re

import pytest
import torch

from nla.machine.errors import UserError
from nla.refine import block as refining
from nla.refine.block import relative_error
from nla.stages import fit_blocks
from tests.conftest import configuration
from tests.test_statistics import tiny

SMALL = ["task.window=64", "task.max_windows=2", "track=none", "statistics.windows=40", "statistics.length=64", "ratio=0.5"]
LLAMA = ["model=tiny_llama", "method=svd_llm", "refine=block", *SMALL]


def refine_lines(outputs) -> list[dict]:
    (path,) = (outputs / "runs").glob("*/refine.jsonl")
    return [json.loads(line) for line in path.read_text().splitlines()]


def perplexity(record) -> float:
    return record.metrics["compressed"]["language_modelling"]["sotu"]["perplexity"]


def test_every_position_counts_the_same_however_large_its_outputs_are():
    target = torch.tensor([[[3.0, 4.0], [300.0, 400.0]]])
    output = target + torch.tensor([[[1.0, 0.0], [0.0, 100.0]]])
    assert float(relative_error(output, target)) == pytest.approx((1 / 25 + 100**2 / 500**2) / 2)


def test_a_position_whose_outputs_are_zero_gives_a_finite_error():
    assert torch.isfinite(relative_error(torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)))


@pytest.mark.parametrize(
    "model",
    [
        ["model=tiny_llama", "method=svd_llm"],
        ["model=tiny_llama", "kernel=phase", "method=nla_outputs", "solver.steps=5"],
        ["model=tiny_llama", "kernel=gaussian", "solver.steps=2"],
        ["model=tiny_llama", "method=hybrid", "solver.steps=2"],
        ["model=tiny_opt", "solver.steps=0"],
        ["model=tiny_llama", "method=svd", "dtype=bfloat16"],
    ],
    ids=lambda a: "-".join(a),
)
def test_refinement_lowers_the_error_of_the_blocks_outputs_on_samples_that_it_did_not_train_on(model, run_here, tmp_path):
    record = run_here(*model, "refine=block", "refine.lr=4e-3", *SMALL)  # a few steps of tiny models bear no larger rate
    lines = refine_lines(tmp_path)
    assert [line["block"].rpartition(".")[2] for line in lines] == ["0", "1"]
    assert all(line["after"] < line["before"] and line["epoch"] > 0 for line in lines)
    assert record.refinement.error_after == pytest.approx(sum(line["after"] for line in lines) / 2)


def test_the_slowest_fits_of_a_block_begin_first_and_the_record_has_the_models_order(run_here, tmp_path):
    record = run_here(*LLAMA)
    (path,) = (tmp_path / "runs").glob("*/losses.jsonl")
    fitted = [json.loads(line)["name"].rpartition(".")[2] for line in path.read_text().splitlines()]
    assert fitted[0] == "down_proj" and set(fitted[5:7]) == {"k_proj", "v_proj"} and fitted[7:] == fitted[:7]
    names = [fit.name for fit in record.fits]
    assert [name.rpartition(".")[2] for name in names[:2]] == ["q_proj", "k_proj"] and names[-1].endswith("1.mlp.down_proj")


def test_a_swin_is_refined_stage_by_stage(run_here, tmp_path):
    arguments = ["model=tiny_swin", "method=svd", "refine=block", "statistics.windows=300", "task.max_images=16", "track=none"]
    record = run_here(*arguments)
    assert record.refinement.error_after < record.refinement.error_before


def test_inputs_pass_the_refined_blocks_before_and_targets_only_dense_ones(run_here, tmp_path, monkeypatch):
    seen = {}

    def spy(block, stream, targets, *others):
        inputs = [state.clone() for state in stream.states]
        seen[block.name] = inputs, [target.clone() for target in targets]
        result = refining.refine_block(block, stream, targets, *others)
        seen[block.name] += ([stream.through(block, state) for state in inputs],)
        return result

    monkeypatch.setattr(fit_blocks, "refine_block", spy)
    run_here(*LLAMA)
    first, second = seen.values()
    torch.testing.assert_close(torch.cat(second[0]), torch.cat(first[2]), rtol=0, atol=0)
    model, _, _ = tiny("tiny_llama", tmp_path / "cache")
    layers = model.module.model.layers
    hidden = []
    layers[0].register_forward_pre_hook(lambda module, args: hidden.append(args[0]))
    for layer in layers:
        layer.register_forward_hook(lambda module, args, output: hidden.append(output))
    from nla.harness.request import prepare
    from nla.harness.settings import check_settings

    prepared = prepare(check_settings(configuration(*LLAMA, f"outputs_dir={tmp_path}")))
    asked = prepared.values["statistics"]
    samples = prepared.calibration.samples(model, asked["windows"], asked["length"], asked["seed"])
    with torch.no_grad():
        model.logits(torch.cat([sample.inputs for sample in samples]))
    for expected, states in zip(hidden, (first[0], first[1], second[1]), strict=True):
        torch.testing.assert_close(torch.cat(states), expected, rtol=1e-4, atol=1e-5)


def test_a_refinement_that_makes_a_block_worse_leaves_it_as_it_was_fitted(run_here, tmp_path):
    refined = run_here(*LLAMA, "refine.lr=3")
    assert all(line["epoch"] == 0 and line["after"] == line["before"] for line in refine_lines(tmp_path))
    fitted = run_here(*LLAMA[:2], *SMALL)
    assert perplexity(refined) == pytest.approx(perplexity(fitted), rel=1e-5)


@pytest.mark.parametrize("lost", [["0", "1"], ["1"], ["0"], []], ids=str)
def test_a_refinement_goes_on_behind_the_blocks_that_are_in_the_cache_with_the_same_result(
    lost, run_here, tmp_path, monkeypatch
):
    whole = run_here(*LLAMA)
    lines = refine_lines(tmp_path)
    keys = {}
    remember = fit_blocks.refine_block
    monkeypatch.setattr(fit_blocks, "refine_block", lambda *a: keys.setdefault(a[0].name, remember(*a)))
    by_block = {}
    for path in (tmp_path / "cache" / "refined").glob("*.safetensors"):
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            by_block[json.loads(file.metadata()["info"])["block"].rpartition(".")[2]] = path
    for block in lost:
        by_block[block].unlink()
    for path in (tmp_path / "runs").glob("*/record.json"):
        path.unlink()
    again = run_here(*LLAMA)
    assert [name.rpartition(".")[2] for name in keys] == lost  # only what was lost is trained again
    for line in (after := refine_lines(tmp_path)) + lines:
        del line["seconds"]
    assert after == lines
    assert perplexity(again) == perplexity(whole)


def test_a_sequential_nla_is_refined_behind_compressed_blocks(run_here, tmp_path):
    arguments = ["model=tiny_llama", "kernel=phase", "method=nla_outputs", "solver.steps=3", "refine=block", *SMALL]
    plain, sequential = (run_here(*arguments, f"method.sequential={s}") for s in ("false", "true"))
    errors = [[fit.svd_llm_error for fit in record.fits if "layers.1" in fit.name] for record in (plain, sequential)]
    assert errors[0] != errors[1]


def test_bfloat16_products_give_nearly_the_same_errors(run_here, tmp_path):
    found = [run_here(*LLAMA, f"refine.products={products}").refinement for products in ("float32", "bfloat16")]
    assert found[0].error_after != found[1].error_after
    assert found[1].error_after == pytest.approx(found[0].error_after, rel=0.02)


def test_one_batch_of_text_of_which_none_can_be_held_out_is_refused_before_the_weights_are_read(run_here):
    with pytest.raises(UserError, match=r"refine=block holds a batch of samples out, but statistics.windows=16 "):
        run_here(*LLAMA, "statistics.windows=16", "dry_run=true")  # of 64 tokens; a batch has 1,024


def test_one_batch_of_images_is_refused(run_here):
    with pytest.raises(UserError, match=r"refine=block holds a batch of samples out, but statistics.windows=1 "):
        run_here("model=tiny_swin", "method=svd_llm", "refine=block", "track=none", "task.max_images=8", "statistics.windows=1")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("refine.epochs=0", "refine.epochs=0 must be a whole number from 1"),
        ("refine.held_out=1.0", "refine.held_out=1.0 must be a fraction"),
        ("refine.held_out=0", "refine.held_out=0 must be a fraction"),
        ("refine.train=everything+linear_term", "refine.train=linear_term is not known"),
        ("dtype=float16", "float16 cannot be refined"),
        ("refine.products=int8", "refine.products=int8 is not known"),
    ],
)
def test_a_wrong_setting_is_refused(setting, message, run_here):
    with pytest.raises(UserError, match=message):
        run_here(*LLAMA, setting)


def test_a_sequential_fit_of_the_weights_alone_is_refused(run_here):
    with pytest.raises(UserError, match=r"add method\.loss=activation"):
        run_here("model=tiny_llama", "method.sequential=true", *SMALL)


def test_a_dry_run_counts_three_forward_passes_for_each_token_of_each_epoch(run_here, caplog):
    """The forward pass of linear factors is two operations for each of their numbers, of which one a rank is a scale."""
    fits = run_here(*LLAMA).fits
    with caplog.at_level("INFO"):
        run_here(*LLAMA, "dry_run=true", "refine.epochs=3")
    ranks = {fit.name: fit.n_params // (sum(fit.shape) + 1) for fit in fits}
    forward = sum(2 * ranks[fit.name] * sum(fit.shape) for fit in fits)
    told = re.search(r"refinement +(\S+) MFLOP in the selected layers, for 7,680 tokens", caplog.text)
    assert float(told[1]) == pytest.approx(3 * forward * 40 * 64 * 3 / 1e6, rel=1e-3)


def test_the_result_of_a_refined_run_fits_a_terminal_of_80_columns(run_here, caplog):
    with caplog.at_level("INFO", logger="nla.harness.show_result"):
        run_here(*LLAMA)
    lines = [line for record in caplog.records for line in record.getMessage().splitlines()]
    assert any("refinement: mean error of 2 blocks' outputs" in line for line in lines)
    assert max(len(line) for line in lines if not line.startswith("record: ")) <= 80
