"""Runs that retrain: their records and weights. Kills and the number of processes do not change the result."""

import json
import math
import signal
import time
from types import SimpleNamespace

import pytest
import torch

from nla.harness.settings import check_settings
from nla.machine.cache import Cache
from nla.machine.errors import NonFiniteError
from nla.pipeline import run
from nla.retrain import stages
from nla.stages import train_together
from tests import forked
from tests.conftest import SHORT, TINY, command, configuration, figures, only_folder, only_record, records

ADAPTIVE = [*SHORT, "retrain.steps=12", "budget=adaptive", "schedule.interval=2"]


def rows_of(tmp_path) -> list[dict]:
    (file,) = (tmp_path / "runs").glob("*/steps.jsonl")
    return [json.loads(line) for line in file.read_text().splitlines()]


def weights_of(outputs) -> dict[str, torch.Tensor]:
    (file,) = (outputs / "cache" / "retrained").glob("*.safetensors")
    tensors, _ = Cache(outputs / "cache").load_tensors("retrained", file.stem)
    return tensors


def timeless(record: dict) -> dict:
    """The figures of a record, without the seconds of steps."""
    record = figures(record)
    del record["retraining"]["seconds"]
    for row in record["history"]:
        row.pop("seconds", None)
    return record


def kill_when(outputs, arguments: list[str], reached) -> None:
    """Start a run, and `kill -9` it as soon as reached() is true."""
    process = forked.start(command(outputs, *arguments))
    while process.is_alive() and not reached():
        time.sleep(0.005)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL


@pytest.fixture(scope="module")
def adaptive_run(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("adaptive")
    result = forked.finish(command(outputs, *ADAPTIVE))
    assert result.returncode == 0, result.stderr
    return outputs, result.stdout


def test_retraining_lowers_the_loss_and_ends_within_the_ratio(adaptive_run):
    outputs, told = adaptive_run
    record = only_record(outputs)
    before, after = (record["metrics"][s]["language_modelling"]["sotu"]["perplexity"] for s in ("compressed", "retrained"))
    assert after < before
    p = record["parameters"]
    assert p["ratio"] >= 0.5 and sum(f["kept"] for f in record["fits"]) == p["selected_after"]
    assert sum(f["fitted"] for f in record["fits"]) == sum(f["n_params"] for f in record["fits"]) > p["selected_after"]
    assert len({f["kept"] for f in record["fits"] if f["shape"] == (48, 48)}) > 1
    assert {"retrain", "retrained"} <= set(record["seconds"]) and record["peak_bytes"]["retrain"] > 0
    assert "tightens them" in told and "retraining: 12 steps" in told and max(map(len, told.splitlines()[:-1])) <= 80
    folder = only_folder(outputs)
    assert folder.name.startswith("tiny_llama-nla-") and "-0.5-adaptive-retrained-" in folder.name
    assert all((folder / f"{name}.png").stat().st_size > 5_000 for name in ("retraining", "kept"))
    assert not list((outputs / "cache" / "trainings").glob("*"))


def test_every_step_leaves_a_row_and_the_budget_is_never_exceeded(adaptive_run):
    rows = rows_of(adaptive_run[0])
    assert [row["step"] for row in rows] == list(range(13))
    record = only_record(adaptive_run[0])
    final = int(0.5 * record["parameters"]["selected_before"])
    sizes = [sum(f["shape"]) + 1 for f in record["fits"]]
    for row in rows[1:]:
        assert {"loss", "lr", "norm", "seconds"} <= set(row)
        assert row["kept"] <= row["budget"]
        if "matrices" in row:
            assert row["budget"] - max(sizes) < row["kept"] == sum(row["matrices"].values()) <= row["budget"]
            assert row["importance"] == sorted(row["importance"])
    assert rows[-1]["budget"] == final and {row["step"] for row in rows if "watched" in row} == {0, 4, 8, 12}


@pytest.mark.parametrize("stopped_after", [0, 8])
def test_a_retraining_killed_at_any_moment_goes_on_to_the_same_weights(adaptive_run, tmp_path, stopped_after):
    def reached() -> bool:
        if not stopped_after:
            return any(tmp_path.glob("runs/*/steps.jsonl"))
        steps = [Cache(tmp_path / "cache").load_json("trainings", f.stem) for f in tmp_path.glob("cache/trainings/*.json")]
        return any(step and step >= stopped_after for step in steps)

    kill_when(tmp_path, ADAPTIVE, reached)
    result = forked.finish(command(tmp_path, *ADAPTIVE))
    assert result.returncode == 0, result.stderr
    quiet = weights_of(adaptive_run[0])
    assert all(torch.equal(tensor, quiet[name]) for name, tensor in weights_of(tmp_path).items())
    assert timeless(only_record(tmp_path)) == timeless(only_record(adaptive_run[0]))
    assert [row["step"] for row in rows_of(tmp_path)] == list(range(13))


@pytest.fixture
def forked_together(monkeypatch):
    """Processes that retrain are forked from the tests' server, which has imported what they need, if the test starts them."""
    monkeypatch.setattr(train_together, "multiprocessing", SimpleNamespace(get_context=lambda kind: forked.SERVER))


def test_two_processes_divide_the_state_and_train_the_weights_of_one_process_even_if_killed(
    tmp_path, cli, run_here, forked_together
):
    arguments = [*SHORT, "retrain.steps=6", "budget=adaptive", "retrain.watch=0", "retrain.checkpoint=2", "schedule.interval=1"]
    arguments += ["refine=block", "statistics.windows=12", "statistics.length=128"]  # it changes the norms, too
    run_here(*arguments, f"outputs_dir={tmp_path / 'one'}")
    two, cache = tmp_path / "two", Cache(tmp_path / "two" / "cache")
    kill_when(two, [*arguments, "retrain.processes=2"], lambda: any(cache.root.glob("trainings/*.json")))
    kept = [cache.load_tensors("trainings", file.stem)[0] for file in sorted(cache.root.glob("trainings/*.safetensors"))]
    run_here(*arguments, "retrain.processes=2", f"outputs_dir={two}")
    names = [{name for name in tensors if name.startswith("model.")} for tensors in kept[:2]]
    sizes = [sum(tensors[name].numel() for name in n) for tensors, n in zip(kept, names, strict=False)]
    assert not names[0] & names[1] and max(sizes) <= 1.1 * min(sizes)
    quiet, found = weights_of(tmp_path / "one"), weights_of(two)
    assert quiet.keys() == found.keys() == {name.removeprefix("model.") for name in names[0] | names[1]}
    for name, tensor in quiet.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=1e-5)
    (record,) = records(two)
    assert record["status"] == "done" and [row["step"] for row in rows_of(two)] == list(range(1, 7))


def test_an_error_in_one_of_several_processes_is_that_of_the_run(run_here, forked_together):
    with pytest.raises(NonFiniteError, match=r"^retrain triplets\+norms: step 1, batch 1.*the loss"):
        run_here(*SHORT, "retrain.steps=3", "retrain.processes=2", "retrain.lr=1e6", "retrain.spike=0.1")


@pytest.mark.parametrize("model", ["tiny_llama", "tiny_opt", "tiny_swin"])
@pytest.mark.parametrize("retrain", ["default", "lora", "u_then_v", "pela"])
def test_every_way_of_retraining_runs_on_every_architecture(run_here, tmp_path, model, retrain):
    task = ["task.max_images=32", "track=none", "retrain.batch=8", "retrain.micro=4"]
    text = [*TINY[1:], "retrain.length=32", "retrain.batch=2", "retrain.micro=1"]
    way = [] if retrain == "default" else [f"retrain={retrain}"]
    few = ["retrain.steps=2", "retrain.watch=2", "retrain.linear_term=1", "method=svd", "ratio=0.4", "dtype=bfloat16"]
    record = run_here(f"model={model}", *way, *(task if model == "tiny_swin" else text), *few)
    assert record.status == "done" and record.parameters.ratio >= 0.4
    losses = [row["loss"] for row in record.history if "loss" in row]
    assert len(losses) == 2 and all(map(math.isfinite, losses))


@pytest.mark.parametrize("way", [["retrain=u_then_v"], ["budget=adaptive", "schedule.interval=1", "retrain=distilled"]])
def test_the_papers_kernel_is_retrained_in_bf16(run_here, way):
    few = ["retrain.steps=4", "retrain.watch=0", "retrain.length=32", "ratio=0.4", "solver.steps=0", "dtype=bfloat16"]
    record = run_here(*TINY, *way, *few)
    assert record.parameters.ratio >= 0.4
    losses = [row["loss"] for row in record.history if "loss" in row]
    assert len(losses) == 4 and all(map(math.isfinite, losses))


class StoppedError(Exception):
    pass


@pytest.mark.parametrize(
    "way",
    [
        ["kernel=linear", "retrain.train=[A,B,A]"],
        ["dtype=bfloat16", "budget=adaptive", "schedule.interval=1"],
    ],
    ids=["last stage", "cool-down"],
)
def test_a_retraining_that_was_stopped_near_its_end_goes_on_to_the_same_weights(tmp_path, monkeypatch, way):
    arguments = [*TINY, "solver.steps=0", "ratio=0.5", "retrain.length=64", "retrain.steps=12", "retrain.checkpoint=2", *way]

    def finish(name: str) -> None:
        run(check_settings(configuration(*arguments, "retrain.watch=0", f"outputs_dir={tmp_path / name}")))

    finish("quiet")
    batches = stages.batches

    def stopped(*arguments):
        batch = batches(*arguments)

        def until(step: int):
            if step == 11:
                raise StoppedError
            return batch(step)

        return until

    with monkeypatch.context() as patch, pytest.raises(StoppedError):
        patch.setattr(stages, "batches", stopped)
        finish("stopped")
    finish("stopped")
    quiet, found = weights_of(tmp_path / "quiet"), weights_of(tmp_path / "stopped")
    assert all(torch.equal(tensor, found[name]) for name, tensor in quiet.items())
    assert [row["step"] for row in rows_of(tmp_path / "stopped")] == list(range(1, 13))


def test_a_finished_stage_is_not_trained_again_and_other_measuring_trains_nothing(tmp_path, monkeypatch):
    arguments = [*TINY, "solver.steps=0", "ratio=0.5", "retrain.length=64", "retrain.steps=4", "retrain.train=[A,B]"]
    batches, asked = stages.batches, []

    def finish(*others: str) -> None:
        run(check_settings(configuration(*arguments, "retrain.watch=2", f"outputs_dir={tmp_path}", *others)))

    def counted(*arguments):
        batch = batches(*arguments)

        def note(step: int):
            asked.append(step)
            if asked.count(3) == 1 and step == 3:
                raise StoppedError
            return batch(step)

        return note

    monkeypatch.setattr(stages, "batches", counted)
    with pytest.raises(StoppedError):
        finish()
    finish()
    assert asked == [0, 1, 2, 3, 2, 3]  # the second stage is begun again: fewer than retrain.checkpoint steps are lost
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4] and [r["step"] for r in rows if "watched" in r] == [0, 2, 4]
    finish("task.max_windows=1")
    assert len(asked) == 6


def test_the_optimiser_keeps_two_numbers_of_four_bytes_for_each_that_it_trains(run_here):
    record = run_here(*SHORT, "retrain.steps=1", "retrain.watch=0")
    norms = 5 * 48  # of the tiny LLaMA: two in each of its two layers, and the last one
    assert record.retraining.trained == record.parameters.selected_after + norms
    assert record.retraining.optimiser_bytes == 8 * record.retraining.trained
    assert record.retraining.dense_optimiser_bytes == 8 * record.parameters.model_before
