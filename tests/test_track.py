"""Tests of the figures that Weights & Biases receives."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from statistics import fmean

import pytest

from nla.harness.fits_table import COLUMNS
from nla.harness.record import read_history, read_record
from nla.harness.tracked_figures import loss_rows, ratio, summary
from tests import forked
from tests.conftest import TINY, configuration, only_folder, only_record

TRACKED = [a for a in TINY if a != "track=none"]


class Tracked:
    """An offline run, read by W&B's own reader.

    Attributes:
        run: name, group, job type and id. stats: whether there are system metrics.
        points: the rows that were logged. summary: the last figures. tables: (columns, rows) by name.
    """

    def __init__(self, folder: Path) -> None:
        records = self.read(folder, "--json")
        (self.run,) = [record["run"] for record in records if record["type"] == "run"]
        self.stats = any(record["type"] == "stats" for record in records)
        self.points = [record["history"]["item"] for record in records if record["type"] == "history"]
        (read,) = self.read(folder, "--json", "--summary")
        self.summary, self.exit_code = read["summary"], read["exit_code"]
        media = {name: value["path"] for name, value in self.summary.items() if isinstance(value, dict) and "ncols" in value}
        tables = {name: json.loads((folder / "files" / path).read_text()) for name, path in media.items()}
        self.tables = {name: (table["columns"], table["data"]) for name, table in tables.items()}

    @staticmethod
    def read(folder: Path, *options: str) -> list[dict]:
        command = [Path(sys.executable).with_name("wandb"), "leet", "inspect", *options, folder]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return [json.loads(text)] if "--summary" in options else [json.loads(line) for line in text.splitlines()]

    def series(self, name: str) -> list[float]:
        return [point[name] for point in self.points if name in point]


def tracked(outputs: Path) -> list[Tracked]:
    """All offline runs, the first one first."""
    return [Tracked(folder) for folder in sorted(outputs.glob("wandb/offline-run-*"))]


def test_an_offline_run_read_back_holds_one_table_of_fits_the_summary_and_curves(cli, tmp_path):
    retraining = ["retrain.steps=4", "retrain.length=64", "budget=adaptive", "schedule.interval=1"]
    cli(*TRACKED, "kernel=phase", "solver.steps=40", *retraining)
    record, folder = read_record(only_folder(tmp_path)), only_folder(tmp_path)
    (read,) = tracked(tmp_path)
    assert read.run["display_name"] == folder.name and read.run["run_id"] == record.signature
    assert "run_group" not in read.run and read.run["job_type"] == "nla-phase" and read.stats and read.exit_code == 0

    fits = [list(fit.model_dump().values()) for fit in record.fits]
    assert read.tables["fits"] == (COLUMNS, [[*row[:-2], None, None] for row in fits])  # logged before retraining
    assert read.tables["kept"][1] == [[f.name, f.fitted, f.kept, f.kept_fraction] for f in record.fits]
    said = [[stage, record.config["prompt"], text] for stage, text in record.continuations.items()]
    assert read.tables["continuations"] == (["stage", "prompt", "text"], said) and len(said) == 3
    assert [row[0] for row in read.tables["plan"][1]] == [f.name for f in record.fits]
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    losses = {line["name"]: line["losses"] for line in lines}
    assert read.tables["losses"][1] == [[name, *pair] for name, pairs in losses.items() for pair in pairs]
    worst = sorted(record.fits, key=lambda fit: -fit.relative_error)[:10]
    assert read.tables["largest_errors_table"][1] == [[step, f.name, x] for f in worst for step, x in losses[f.name]]
    metrics = {tuple(row[:4]): row[4:] for row in read.tables["metrics"][1]}
    for stage in ("dense", "compressed", "retrained"):
        figures = dict(record.metrics[stage]["language_modelling"]["sotu"])
        error = figures.pop("perplexity_stderr")
        found = {metric: rest for (*where, metric), rest in metrics.items() if where == [stage, "language_modelling", "sotu"]}
        assert found == {name: [value, error if name == "perplexity" else None] for name, value in figures.items()}
        assert read.summary[f"perplexity/{stage}"] == figures["perplexity"]
        assert read.summary[f"perplexity_stderr/{stage}"] == error

    assert read.series("fits/error") == [fit.relative_error for fit in record.fits]
    for name in ("loss", "lr", "norm", "kept", "budget", "watched_perplexity"):
        rows = [row[name] for row in read_history(folder) if name in row]
        assert len(rows) >= 2 and read.series(f"retrain/{name}") == pytest.approx(rows)
    assert len(read.series("retrain/importance/50%")) >= 2
    assert {name for name in read.summary if name.startswith("images/")} == {
        f"images/{figure}" for figure in ("loss_by_layer", "retraining", "kept")
    }
    expected = summary(record)
    assert {name: read.summary[name] for name in expected} == pytest.approx(expected) and len(expected) < 15
    assert {"error", "to_svd", "bytes", "bytes_before", "bits", "ratio", "peak_bytes", "seconds"} < set(expected)
    charts = {name for point in read.points for name in point if isinstance(point[name], int | float) and "." not in name}
    assert len(charts) < 40 and not any(fit.name in name for fit in record.fits for name in charts)


@pytest.mark.parametrize("experiment", ["", "adaptive_opt_small"])
def test_the_group_is_the_sweep_or_the_experiment_and_ratios_to_both_baselines_are_in_the_summary(cli, tmp_path, experiment):
    few = ["method=svd_llm", "statistics.windows=4", "statistics.length=32", "budget=uniform", "retrain.steps=0"]
    cli(*([f"experiment={experiment}"] if experiment else ["-m"]), *TRACKED, *few)
    (read,), (sweep,) = tracked(tmp_path), (tmp_path / "sweeps").iterdir()
    assert read.run["run_group"] == (experiment or sweep.name)
    expected = read_record(only_folder(tmp_path)).fits
    means = {
        "to_svd": fmean(fit.relative_error / fit.svd_error for fit in expected),
        "to_svd_llm": fmean(fit.weighted_error / fit.svd_llm_error for fit in expected),
    }
    assert {name: read.summary[name] for name in means} == pytest.approx(means)
    assert not {"losses", "largest_errors_table", "kept"} & set(read.tables)  # no steps were taken


def test_a_failed_run_shows_the_fits_it_has_and_is_the_same_run_when_it_goes_on(tmp_path, monkeypatch):
    from nla.harness.settings import check_settings
    from nla.pipeline import run
    from nla.stages import fit

    settings = check_settings(configuration(*TRACKED, "solver.steps=5", f"outputs_dir={tmp_path}"))

    def write_some(file, value, write=fit.write_line):
        write(file, value)
        assert not value["name"].endswith("1.self_attn.q_proj")

    with monkeypatch.context() as broken:
        broken.setattr("nla.stages.fit.write_line", write_some)
        with pytest.raises(AssertionError):
            run(settings)
    run(settings)
    failed, done = tracked(tmp_path)
    assert (failed.exit_code, done.exit_code) == (1, 0) and failed.run["run_id"] == done.run["run_id"]
    assert (len(failed.tables["fits"][1]), len(done.tables["fits"][1])) == (8, 14)
    assert "error" in failed.summary and len(done.series("fits/error")) == 14  # the later run holds everything


def test_a_long_curve_is_thinned_to_its_ends_and_even_points_and_two_exact_fits_have_ratio_1():
    curve = [(step, 1 / (1 + step)) for step in range(1000)]
    rows = loss_rows({"m": curve, "n": curve[:3]}, points=200)
    assert len(rows) == 203 and rows[0] == ["m", 0, 1.0] and rows[199] == ["m", 999, 0.001]
    assert {b[1] - a[1] for a, b in itertools.pairwise(rows[:200])} <= {5, 6}
    assert (ratio(0.0, 0.0), ratio(0.5, 0.0), ratio(0.2, 0.4)) == (1.0, math.inf, 0.5)


@pytest.mark.parametrize(
    "module", ["raise ImportError('no wandb here')", "def init(**_): raise OSError('no disk')\nSettings = dict"]
)
def test_an_absent_or_failing_tracker_never_loses_a_run(cli, tmp_path, module):
    (tmp_path / "fake").mkdir()
    (tmp_path / "fake" / "wandb.py").write_text(module)
    result = cli(*TRACKED, "solver.steps=5", environment={"PYTHONPATH": str(tmp_path / "fake")})
    reason = module.split("'")[1]
    assert f"Weights & Biases failed ({reason})" in result.stdout and only_record(tmp_path)["status"] == "done"


def account(tmp_path, **environment: str) -> bool:
    """Whether a new process with its own home directory finds an account."""
    code = "from nla.harness.weights_and_biases import has_account; print(has_account())"
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
    cli(*TRACKED, "solver.steps=5", "track.mode=online", environment={"HOME": str(tmp_path), "NETRC": "/dev/null"})
    assert list(tmp_path.glob("wandb/offline-run-*"))
