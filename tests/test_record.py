"""Tests of the record of a run: its name, its table, how its fits ended, and errors about damaged files."""

import json
import shutil

import pytest
import torch

from analysis.settings import PRESETS
from nla.harness import record
from nla.harness.fits_table import FitRecord, parse_terms, read_fits
from nla.harness.record import RunRecord, read_record, run_name, seal_of
from nla.harness.request import resolve
from nla.harness.settings import check_settings
from nla.harness.told import told_of_endings
from nla.kernels.linear import Linear
from nla.machine.errors import UserError
from nla.pipeline import run
from nla.solvers.base import REPAIRS, Status
from nla.terms.base import Sum
from nla.terms.kernel_term import KernelTerm
from tests.conftest import TINY, configuration, only_folder, only_record, options

FAST = [*TINY, "solver.steps=10"]


@pytest.mark.parametrize("method", sorted(set(options("method")) - PRESETS))
def test_a_runs_folder_is_named_after_model_method_and_ratio(method):
    config = resolve(check_settings(configuration(*TINY, f"method={method}", "ratio=0.50")))
    del config["retrain"]  # as in a run without retraining
    kernel = f"-{config['method']['kernel']['_target_'].split('.')[-2]}" if "kernel" in config["method"] else ""
    assert run_name(config, "0123456789abcdef") == f"tiny_llama-{method}{kernel}-0.5-01234567"
    asked = config | {"ratio": None, "bits": 2.28, "model": {"name": "../a model/of: mine"}, "retrain": {}}
    assert run_name(asked, "0123456789abcdef") == f"_a_model_of_mine-{method}{kernel}-2.28bits-retrained-01234567"


def test_a_runs_folder_names_the_width_of_few_bits():
    shown = {"svd_llm storage=int3": "svd_llm-int3", "nla_angles": "nla-phase-angle", "nla_levels": "nla-linear-int"}
    for asked, named in shown.items():
        arguments = f"method={asked} bits=2".split()
        config = resolve(check_settings(configuration("model=tiny_llama", *arguments)))
        assert run_name(config | {"retrain": {}}, "0123456789") == f"tiny_llama-{named}-2bits-retrained-01234567"


def test_a_record_stays_valid_when_later_versions_have_more_fields(run_here, tmp_path):
    """An older version wrote a record without the latest field, and its seal with it."""
    run_here(*TINY, "method=svd")
    path = only_folder(tmp_path) / "record.json"
    values = json.loads(path.read_text())
    del values["refinement"]
    path.write_text(json.dumps(values | {"seal": seal_of(values, read_fits(path.parent / "fits.csv"))}))
    assert read_record(path.parent).status == "done"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="was changed after the run"):
        read_record(path.parent)


def test_a_stop_between_the_two_files_of_a_run_that_begins_again_leaves_no_finished_record_without_fits(
    run_here, tmp_path, monkeypatch
):
    run_here(*TINY, "method=svd")
    begun = read_record(only_folder(tmp_path)).model_copy(update={"status": "running", "fits": []})
    written = []

    def stopped(path, contents):
        if written:
            raise KeyboardInterrupt
        written.append(path.write_bytes(contents))

    monkeypatch.setattr(record, "write_atomically", stopped)
    with pytest.raises(KeyboardInterrupt):
        begun.write(only_folder(tmp_path))
    assert read_record(only_folder(tmp_path)).status == "running"


def test_a_finished_run_that_fails_when_it_begins_again_to_save_its_model_keeps_its_figures(run_here, tmp_path, monkeypatch):
    asked = [*TINY, "method=svd", "retrain.steps=2", "retrain.length=32", "retrain.watch=0"]
    run_here(*asked)
    folder = only_folder(tmp_path)
    before = {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix in (".csv", ".json", ".jsonl")}
    shutil.rmtree(tmp_path / "cache")
    with monkeypatch.context() as stopped:
        stopped.setattr("nla.pipeline.retrain", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_here(*asked, "save=true")
    assert len(before) == 4 and all((folder / name).read_bytes() == contents for name, contents in before.items())
    run_here(*asked, "save=true")
    assert read_record(folder).saved == str(folder / "model")


def test_terms_are_read_back_from_their_text():
    terms = Sum([KernelTerm.empty(Linear(), 8, 6, h, r, torch.float32) for h, r in ((43, 20), (0, 1))])
    assert parse_terms(terms.describe()) == [("linear", 43, 20), ("linear", 0, 1)]
    assert parse_terms("phase h=43 r=1 + grid bits=4") == [("phase", 43, 1), ("grid", 0, 0)]
    for damaged in ("", "h=43 r=20", "linear h=43 + "):
        with pytest.raises(ValueError, match="no sum of terms"):
            parse_terms(damaged)


def ended(**counts: int) -> str:
    """The terminal's text for fits with these numbers of each status; `__` stands for a space."""
    statuses = [status.replace("__", " ") for status, count in counts.items() for _ in range(count)]
    return told_of_endings(RunRecord.model_construct(fits=[FitRecord.model_construct(status=s) for s in statuses]))


def test_how_fits_ended_takes_one_line_to_three_of_80_columns():
    assert ended(optimal=11, step_limit=3) == "ended: 11 optimal, 3 step_limit (solver.steps=... goes on)"
    assert ended(**{"optimal": 3, "optimal__fisher=0": 1}) == "ended: 4 optimal; repaired: 1 Fisher information (zero)"
    assert ended(**{"": 2}) == "ended: 2 unknown"  # as for a new method that gives no status
    fitted = [status for status in Status if status is not Status.ROUNDED]  # which never stands beside `linear`
    for name in REPAIRS:
        lines = ended(**{f"{status.code}__{name}+1.1e-01": 999 for status in fitted}).splitlines()
        assert len(lines) == 3 and all(len(line) <= 80 for line in lines)


DAMAGE = [
    ("record.json", lambda text: text.replace('"environment"', '"surroundings"'), "environment: Field required"),
    ("record.json", lambda text: text.replace('"selected_before": ', '"selected_before": 0.5'), r"parameters\.selected_before"),
    ("record.json", lambda text: text[: len(text) // 2], "the file"),
    ("fits.csv", None, "cannot be read"),
    ("fits.csv", lambda text: text[: len(text) // 2], "row 7"),
    ("fits.csv", lambda text: text[:-2], "row 14 is not whole"),
    ("fits.csv", lambda text: text.replace("piecewise h", "h", 1), "row 1: terms: .* no sum of terms"),
    ("fits.csv", lambda text: text.replace("svd_error", "svd"), "its columns are"),
]


@pytest.mark.parametrize("name, change, expected", DAMAGE, ids=lambda value: value if isinstance(value, str) else "")
def test_a_damaged_record_is_named_with_its_field(finished_run, tmp_path, name, change, expected):
    folder = shutil.copytree(finished_run, tmp_path / "run")
    path = folder / name
    if change:
        path.write_text(change(path.read_text()))
    else:
        path.unlink()
    with pytest.raises(UserError, match=rf"{path} .*{expected}"):
        read_record(folder)


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    outputs = tmp_path_factory.mktemp("finished")
    run(check_settings(configuration(*FAST, f"outputs_dir={outputs}")))
    return only_folder(outputs)


def test_a_failed_run_keeps_what_there_is_and_goes_on_in_its_folder(run_here, tmp_path, monkeypatch):
    with monkeypatch.context() as broken:
        broken.setattr("nla.pipeline.draw", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_here(*FAST)
    record = only_record(tmp_path)
    assert record["status"] == "failed" and record["error"] == "division by zero" and record["finished"]
    assert len(record["fits"]) == 14 and record["command"] is None
    run_here(*FAST)
    assert only_record(tmp_path)["status"] == "done"
