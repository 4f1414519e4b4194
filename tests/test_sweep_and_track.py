"""Tests of sweeps and their table, and of the figures that Weights & Biases receives."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import forked
from tests.conftest import TINY, only_folder, only_record, records

SWEEP = ["-m", *TINY, "solver.steps=5"]


@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep_survives_a_failing_job_shares_the_dense_baseline_and_ends_with_one_table(cli, tmp_path, launcher):
    arguments = [*SWEEP, f"hydra/launcher={launcher}", "ratio=0.5,0.999", "kernel=linear,phase"]
    result = cli(*arguments, check=False, fresh=launcher == "joblib")
    assert result.returncode != 0
    table = result.stdout[result.stdout.rindex("sweep ") :]
    assert table.count("failed: ratio=0.999") == 2 and "use ratio=0.936" in table
    for kernel in ("linear", "phase"):
        (row,) = [line for line in table.splitlines() if line.startswith(f"ratio=0.5 kernel={kernel}")]
        assert len(row.split()) == 6
    done = records(tmp_path)
    assert len(done) == 2 and {r["status"] for r in done} == {"done"}
    dense = [r["metrics"]["dense"] for r in done]
    commands = [r["command"] for r in done]
    assert all(c.startswith("python run.py model=tiny_llama") and c.count("kernel=") == 1 for c in commands)
    assert dense[0] == dense[1]  # to the last digit of tokens per second: measured once
    assert len(list((tmp_path / "cache" / "windows").glob("*.jsonl"))) == 3


def inspect(outputs: Path) -> list[dict]:
    """The records of an offline run, read by W&B's own reader."""
    (run,) = outputs.glob("wandb/offline-run-*")
    wandb = Path(sys.executable).with_name("wandb")
    result = subprocess.run([wandb, "leet", "inspect", "--json", run], capture_output=True, text=True, check=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


def test_an_offline_run_read_back_holds_losses_errors_plan_figures_steps_and_perplexities(cli, tmp_path):
    retraining = ["retrain.steps=4", "retrain.length=64", "budget=adaptive", "schedule.interval=1"]
    cli(*[a for a in TINY if a != "track=none"], "kernel=phase", "solver.steps=40", *retraining)
    record = only_record(tmp_path)
    text = json.dumps(inspect(tmp_path))
    lines = (only_folder(tmp_path) / "losses.jsonl").read_text().splitlines()
    for line in map(json.loads, lines):
        name = line["name"]
        assert f"loss/{name}" in text
        assert all(f"fit/{name}/{key}" in text for key in ("relative_error", "svd_error", "floor", "peak_bytes"))
        assert len(line["losses"]) >= 3
        assert all(repr(loss)[:12] in text for _, loss in line["losses"])
    for row in record["history"][1:]:
        assert all(repr(row[key])[:12] in text for key in ("loss", "lr", "norm", "kept"))
    for key in ("budget", "watched_perplexity", "importance/50%", f"kept/{record['fits'][0]['name']}"):
        assert f"retrain/{key}" in text
    for stage in ("dense", "compressed", "retrained"):
        perplexity = record["metrics"][stage]["language_modelling"]["sotu"]["perplexity"]
        assert f"{stage}/language_modelling/sotu/perplexity" in text and repr(perplexity)[:12] in text
    assert (
        all(f"images/{figure}_" in text for figure in ("loss_by_layer", "retraining", "kept"))
        and "plan.table.json" in text
        and "parameters/selected_after" in text
    )


@pytest.mark.parametrize(
    "module", ["raise ImportError('no wandb here')", "def init(**_): raise OSError('no disk')\nSettings = dict"]
)
def test_an_absent_or_failing_tracker_never_loses_a_run(cli, tmp_path, module):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(module)
    arguments = [a for a in TINY if a != "track=none"]
    result = cli(*arguments, "solver.steps=5", environment={"PYTHONPATH": str(tmp_path / "fake")})
    assert "Weights & Biases failed" in result.stdout and only_record(tmp_path)["status"] == "done"


def account(tmp_path, **environment: str) -> bool:
    """Whether a new process with its own home directory finds an account."""
    code = "from nla.harness.track import has_account; print(has_account())"
    own = {"HOME": str(tmp_path), "NETRC": str(tmp_path / "netrc")} | environment
    result = forked.finish(["-c", code], own)
    return result.stdout.strip().endswith("True")


def test_an_account_is_what_wandb_itself_would_log_in_with(tmp_path):
    assert not account(tmp_path)
    key = "0123456789" * 4
    assert account(tmp_path, WANDB_API_KEY=key)
    (tmp_path / "netrc").write_text(f"machine wandb.example.org\n login user\n password {key}\n")
    (tmp_path / "netrc").chmod(0o600)
    assert account(tmp_path, WANDB_BASE_URL="https://wandb.example.org")
    assert not account(tmp_path)


def test_online_without_an_account_is_offline_and_asks_nothing(cli, tmp_path):
    arguments = [a for a in TINY if a != "track=none"]
    cli(*arguments, "solver.steps=5", "track.mode=online", environment={"HOME": str(tmp_path), "NETRC": "/dev/null"})
    assert list(tmp_path.glob("wandb/offline-run-*"))
