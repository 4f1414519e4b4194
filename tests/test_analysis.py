"""Tests of the notebooks, of the collection of records in git, and of the names of settings."""

import nbformat
import pytest

from analysis.execute import NOTEBOOKS, execute
from analysis.plots import retraining
from analysis.records import IN_GIT, add, load_records, read_collection, read_xz, write_collection, write_xz
from analysis.settings import changed_settings, nearest_option, typed_settings
from nla.harness.request import prepare
from nla.harness.settings import check_settings
from nla.machine.errors import UserError
from tests import forked
from tests.conftest import SHORT, configuration, only_folder


@pytest.mark.parametrize("notebook", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_every_notebook_runs(notebook):
    result = forked.finish(["-m", "tests.cells", str(notebook)])
    assert result.returncode == 0 and int(result.stdout) > 0, result.stdout + result.stderr


def test_a_notebook_is_written_with_its_outputs(tmp_path):
    execute(NOTEBOOKS / "perplexity.ipynb", tmp_path / "executed.ipynb")
    outputs = [out for cell in nbformat.read(tmp_path / "executed.ipynb", 4).cells for out in cell.get("outputs", [])]
    assert outputs and all(out.output_type != "error" for out in outputs)


def test_the_records_in_git_are_real_finished_runs_of_committed_code():
    records = load_records([IN_GIT])
    assert records
    for record in records:
        assert record.status == "done" and record.environment["commit"] and not record.environment["dirty"]


def test_the_records_in_git_are_small_and_the_same_records_are_written_as_the_same_bytes(tmp_path):
    records = read_collection(IN_GIT)
    write_collection(reversed(records), tmp_path)
    files = sorted(path.name for path in IN_GIT.iterdir() if path.is_file())
    assert files == ["fits.csv.xz", "runs.jsonl.xz", "steps.csv.xz"] == sorted(path.name for path in tmp_path.iterdir())
    assert all(read_xz(tmp_path / name) == read_xz(IN_GIT / name) for name in files)
    before = [(tmp_path / name).read_bytes() for name in files]
    write_collection(records, tmp_path)
    assert [(tmp_path / name).read_bytes() for name in files] == before
    assert sum((IN_GIT / name).stat().st_size for name in files) < 1_000_000


def test_a_damaged_collection_is_named_with_its_line_and_field(tmp_path):
    write_collection(read_collection(IN_GIT)[:2], tmp_path)
    path = tmp_path / "runs.jsonl.xz"
    write_xz(path, read_xz(path).replace('"selected_before"', '"selected"', 1))
    with pytest.raises(UserError, match=rf"{path}: line 1 is no record of schema 2: parameters\.selected_before"):
        read_collection(tmp_path)


def test_runs_are_added_to_those_in_git_once_and_only_finished_ones_of_committed_code(run_here, tmp_path, capsys):
    record = run_here(*SHORT, "retrain.steps=4")
    folder, collection = only_folder(tmp_path), tmp_path / "collection"
    write_collection(read_collection(IN_GIT)[:2], collection)
    record.command = f"python run.py ratio=0.5 outputs_dir={tmp_path} cache_dir={tmp_path}/cache track=none seed=1"
    record.command += f" data=wikitext2 data.path={tmp_path}/wiki.test.raw"
    record.config["task"]["language_modelling"]["data"]["path"] = f"{tmp_path}/wiki.test.raw"
    for dirty, status, count in ((True, "done", 2), (False, "failed", 2), (False, "done", 3), (False, "done", 3)):
        record.environment |= {"dirty": dirty, "commit": "1234567"}
        record.status = status
        record.write(folder)
        add([folder], collection)
        assert len(read_collection(collection)) == count
    said = capsys.readouterr().out
    assert said.count("not added") == 2 and "its status is failed" in said and "not committed" in said
    added = read_collection(collection)[-1]
    assert added.fits == record.fits and [row["step"] for row in added.history] == [0, 1, 2, 3, 4]
    assert retraining(added.history).axes and added.metrics == record.metrics
    assert added.command == "python run.py ratio=0.5 seed=1 data=wikitext2 data.path=wiki.test.raw"
    assert added.config["task"]["language_modelling"]["data"]["path"] == "wiki.test.raw"
    assert str(tmp_path) not in read_xz(collection / "runs.jsonl.xz")  # nothing of the machine that made it


def test_settings_are_named_by_the_nearest_yaml_of_the_same_class():
    assert nearest_option("method", {"_target_": "nla.methods.svd_llm.SVDLLM", "sequential": False}) == ("svd_llm", [])
    spline = {"_target_": "nla.kernels.spline.Spline", "degree": 3, "r": 1, "min_h": 1}
    assert nearest_option("kernel", spline) == ("spline", [("degree", 3)])
    assert nearest_option("kernel", spline, {"degree"}) == ("spline", [])
    assert nearest_option("budget", {"_target_": "their.module.Budget", "x": 1}) == ("module", [("x", 1)])


def test_other_speeches_make_another_run():
    usual = configuration("method=asvd", "calibration=sotu_since_1960")
    other = configuration("method=asvd", "calibration=sotu_since_1960", "data.text.held_out=9", "calibration.text.since=1980")
    found = [changed_settings(prepare(check_settings(c)).values, stepped=False) for c in (usual, other)]
    assert set(found[1]) - set(found[0]) == {"held_out=9", "since=1980"}


def test_a_storage_and_the_solver_that_it_chooses_are_named_as_typed(run_here):
    asked = ["model=tiny_llama", "track=none", "bits=6", "task.window=64", "task.max_windows=1", "statistics.windows=8"]
    asked += ["select.include=up_proj"]
    found = typed_settings(run_here(*asked, "statistics.length=32", "method=nla_angles", "storage.rounds=1", "solver.lr=0.2"))
    named = ("method", "method.loss", "kernel", "storage", "storage.rounds", "solver.lr", "bits")
    assert [found[key] for key in named] == ["nla", "activation", "phase", "angles", "1", "0.2", "6.0"]
    assert not {"solver.steps", "storage.width", "ratio"} & found.keys()
