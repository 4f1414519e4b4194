"""Attacks by the machine: full and read-only disks, odd files, changed records. A run ends in one sentence that names the path.

It leaves no drafts behind, and its record says that it failed, if it can still be written.
"""

import os
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from nla.harness.record import read_record
from nla.machine.cache import Cache
from nla.machine.errors import UserError
from nla.machine.sealed_folder import sealed_folder
from nla.statistics.blocks import Stream
from tests import forked
from tests.attack.disk import run_on
from tests.attack.ends import QUICK, drafts, faults, files, finish
from tests.conftest import TINY, command, figures, only_folder, only_record, records


@pytest.fixture(scope="module")
def quiet(tmp_path_factory) -> Path:
    """The outputs of an undisturbed QUICK run."""
    outputs = tmp_path_factory.mktemp("quiet")
    assert finish(outputs, *QUICK).returncode == 0
    return outputs


@pytest.fixture
def finished(quiet, tmp_path) -> Path:
    """A copy of these outputs."""
    return shutil.copytree(quiet, tmp_path / "finished")


# A full disk: the file at which it gets full, bytes that then still fit, a part of the sentence, and status.
FULL = {
    "everything": ("", 0, "/fits.csv: ", None),
    "the first record": (".record.json", 1_000, "/record.json: ", None),
    "the reserve": (".reserve", 10_000, "/.reserve: ", "failed"),
    "a window": ("/windows/", 100, "/cache/windows/", "failed"),
    "a figure": (".png", 10_000, "/loss_by_layer.png: ", "failed"),
}


@pytest.mark.parametrize("what", FULL)
def test_a_full_disk_ends_a_run_in_one_sentence_with_a_failed_record(tmp_path, what):
    pattern, free, named, status = FULL[what]
    end = forked.finish(run_on(f"full({pattern!r}, {free})", tmp_path, command(tmp_path, *QUICK)))
    assert not faults(end, tmp_path, 2, named, status)
    assert "No space left on device" in end.stderr


def test_a_disk_that_gets_full_at_the_fits_ends_a_run_and_given_space_it_goes_on_to_the_same_figures(quiet, tmp_path):
    end = forked.finish(run_on("full('/fits/', 20_000)", tmp_path, command(tmp_path, *QUICK)))
    # fits are written by two threads, and their losses by a third: any of them may meet the full disk first
    assert not faults(end, tmp_path, 2, "/cache/fits/|/losses.jsonl: ", "failed") and "No space left" in end.stderr
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cache/fits/*")}
    end = finish(tmp_path, *QUICK)
    assert not faults(end, tmp_path, 0, None, "done")
    assert kept and all(path.stat().st_mtime_ns == then for path, then in kept.items())
    assert figures(only_record(tmp_path)) == figures(only_record(quiet))


# The second: the stream that tells it. One failed run is a row of the sweep's table; a sweep that cannot begin is an error.
FULL_SWEEP = [("full('', 3_000)", "stderr"), ("full('.record.json', 0)", "stdout"), ("full('/fits/', 20_000)", "stdout")]


@pytest.mark.parametrize("disk, stream", FULL_SWEEP)
def test_a_sweep_on_a_full_disk_ends_with_its_table_if_it_began(tmp_path, disk, stream):
    sweep = ["-m", *TINY, "method=svd", "ratio=0.5,0.6"]
    end = forked.finish(run_on(disk, tmp_path, command(tmp_path, *sweep)))
    assert end.returncode == 2 and "Traceback" not in end.stdout + end.stderr and not drafts(tmp_path)
    told = {"stderr": "error: ", "stdout": "failed: "}[stream]
    assert re.search(f"{told}.*No space left on device", getattr(end, stream), re.DOTALL)
    assert not {record["status"] for record in records(tmp_path)} & {"running"}


@pytest.mark.parametrize("work", ["weights by a library in Rust", "a mapped file"])
def test_a_full_disk_is_also_named_where_python_does_not_write(tmp_path, work):
    def save(draft: Path, _: Path) -> None:
        save_file({"w": torch.zeros(1000)}, draft / "w.safetensors")

    def write() -> None:
        if work == "a mapped file":
            Stream.kept(SimpleNamespace(folder=tmp_path / "states"), torch.zeros(1000))
        else:
            sealed_folder(Cache(tmp_path), "models", "one", save)

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        with pytest.raises(UserError, match=f"{tmp_path}/[a-z]+/.*: File too large; make space"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not {name for name in files(tmp_path) if not name.startswith("locks")} - {"models", "states"}


@pytest.fixture
def tmpfs(tmp_path) -> Iterator[Path]:
    """A disk of its own, of 128 pages; only root may have it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", disk], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"no disk can be mounted here ({made.stderr.strip()}); tests.attack.disk stands for one")
    yield disk
    subprocess.run(["umount", "--lazy", disk], check=True)


@pytest.mark.parametrize("free", [2, 30, 40])
def test_a_real_full_disk_ends_a_run_in_the_same_way_and_a_read_only_one_still_shows_it(tmpfs, free):
    (tmpfs / "other").write_bytes(bytes(4096 * (128 - free)))
    end = finish(tmpfs, *QUICK)
    assert not faults(end, tmpfs, 2, str(tmpfs), None if free == 2 else "failed")
    if free == 40:
        (tmpfs / "other").unlink()
        assert not faults(finish(tmpfs, *QUICK), tmpfs, 0, None, "done")
        subprocess.run(["mount", "-o", "remount,ro", tmpfs], check=True)
        assert "from the record" in finish(tmpfs, *QUICK).stdout


# A disk that may only be read.
@pytest.mark.parametrize("without", ["nothing", "cache"])
def test_a_finished_run_is_shown_from_a_read_only_folder(finished, without):
    if without == "cache":
        shutil.rmtree(finished / "cache")
    record = only_folder(finished) / "record.json"
    before = files(finished), record.read_bytes(), record.stat().st_mtime_ns
    end = forked.finish(run_on("read_only()", finished, command(finished, *QUICK)))
    assert not faults(end, finished, 0, None, "done") and "from the record" in end.stdout
    assert (files(finished), record.read_bytes(), record.stat().st_mtime_ns) == before


@pytest.mark.parametrize("sweep", [[], ["-m"]], ids=["run", "sweep"])
def test_a_new_run_in_a_read_only_folder_is_refused(tmp_path, sweep):
    end = forked.finish(run_on("read_only()", tmp_path, command(tmp_path, *sweep, *QUICK)))
    assert not faults(end, tmp_path, 2, str(tmp_path), None) and "Read-only file system" in end.stdout + end.stderr
    assert not files(tmp_path)


def test_a_read_only_cache_is_refused_before_the_model_is_loaded(tmp_path):
    asked = command(tmp_path / "outputs", *QUICK, f"cache_dir={tmp_path / 'cache'}")
    end = forked.finish(run_on("read_only()", tmp_path / "cache", asked))
    assert not faults(end, tmp_path / "outputs", 2, str(tmp_path / "cache"), None)


# Something else in the place of a folder or a file.
def put(path: Path, what: str) -> None:
    """Put something odd at a path: a file, a directory, a dangling link or a link to itself."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.is_file():
        path.unlink()
    if what == "file":
        path.write_text("mine")
    elif what == "directory":
        path.mkdir()
        (path / "mine").touch()
    else:
        path.symlink_to(path if what == "loop" else path.parent / "no" / "such")


PLACES = [
    ("outputs_dir=/dev/null", None, "/dev/null"),
    ("outputs_dir={}/outputs", "file", "outputs"),
    ("outputs_dir={}/outputs", "dangling", "outputs"),
    ("outputs_dir={}/outputs", "loop", "outputs"),
    ("cache_dir=/dev/null", None, "/dev/null"),
    ("cache_dir={}/cache", "loop", "cache"),
]


# a sweep's own folder is in outputs_dir, so that a wrong cache is the matter of its runs
SWEPT = [([], *place) for place in PLACES] + [(["-m"], *place) for place in PLACES if place[0].startswith("outputs_dir")]


@pytest.mark.parametrize("sweep, setting, what, named", SWEPT, ids=lambda value: str(value).replace("/", "-"))
def test_a_folder_that_is_none_is_named(tmp_path, sweep, setting, what, named):
    setting = setting.format(tmp_path)
    if what:
        put(tmp_path / setting.rpartition("/")[2], what)
    end = finish(tmp_path, *sweep, *QUICK, setting)
    assert not faults(end, tmp_path, 2, named, None)


@pytest.mark.parametrize("what", ["directory", "dangling", "loop"])
def test_odd_cache_entries_are_named_and_made_again(quiet, finished, what):
    (only_folder(finished) / "record.json").unlink()
    odd = [sorted(finished.glob(f"cache/{kind}/*"))[0] for kind in ("inventories", "fits", "windows")]
    for path in odd:
        put(path, what)
    end = finish(finished, *QUICK)
    assert not faults(end, finished, 0, None, "done")
    assert all(path.is_file() and not path.is_symlink() for path in odd)
    assert figures(only_record(finished)) == figures(only_record(quiet))


INSIDE = {
    "cache/fits": ("file", "/cache/fits", "failed"),
    "cache/windows": ("dangling", "/cache/windows", "failed"),
    "cache/locks": ("file", "/cache/locks", "failed"),
    "{run}/.lock": ("directory", "/.lock", None),
    "{run}/record.json": ("directory", "/record.json", None),
    "{run}/losses.jsonl": ("directory", "/losses.jsonl", "failed"),
    "{run}/loss_by_layer.png": ("directory", "/loss_by_layer.png", "failed"),
}


@pytest.mark.parametrize("place", INSIDE)
def test_odd_things_inside_the_outputs_are_named(quiet, tmp_path, place):
    what, named, status = INSIDE[place]
    path = tmp_path / place.format(run=f"runs/{only_folder(quiet).name}")
    put(path, what)
    end = finish(tmp_path, *QUICK)
    if place.endswith("record.json"):
        shutil.rmtree(path)
    assert not faults(end, tmp_path, 2, named, status)


@pytest.mark.parametrize("what", ["file", "dangling", "loop", "digests"])
def test_an_odd_cached_folder_is_made_again(tmp_path, what):
    folder = tmp_path / "models" / "one"
    if what == "digests":
        folder.mkdir(parents=True)
        (folder / "digests.json").write_text("[1]")
    else:
        put(folder, what)
    made = sealed_folder(Cache(tmp_path), "models", "one", lambda draft, _: (draft / "weights").write_text("new") and None)
    assert (made / "weights").read_text() == "new" and not made.is_symlink()


# A record that was changed.
CHANGES = [
    ("record.json", r'("perplexity": \d)\d', r"\g<1>7", "changed"),
    ("record.json", r'("ratio": 0\.)5', r"\g<1>6", "changed"),
    ("record.json", r'"parameters": \{[^}]*\}', '"parameters": null', "parameters"),
    ("fits.csv", r"(?s)\n.*", "\n", "without fits"),
    ("fits.csv", r"0\.(\d)", r"0.9\1", "changed"),
]


@pytest.mark.parametrize("name, old, new, named", CHANGES)
def test_a_finished_record_that_was_changed_is_not_believed(finished, name, old, new, named):
    path = only_folder(finished) / name
    text = path.read_text()
    changed = re.sub(old, new, text, count=1)
    assert changed != text
    path.write_text(changed)
    with pytest.raises(UserError, match=f"{path.parent}.*{named}"):
        read_record(path.parent)


def test_a_changed_record_ends_the_command_in_one_sentence(finished):
    path = only_folder(finished) / "record.json"
    path.write_text(re.sub(r'"parameters": \{[^}]*\}', '"parameters": null', path.read_text()))
    end = finish(finished, *QUICK)
    assert end.returncode == 2 and "Traceback" not in end.stdout + end.stderr
    assert str(path) in end.stderr and "perplexity" not in end.stdout


def test_an_unfinished_record_that_is_damaged_does_not_stop_the_next_run(finished):
    folder = only_folder(finished)
    (folder / "record.json").write_text((folder / "record.json").read_text().replace('"done"', '"running"'))
    (folder / "fits.csv").write_text("cut")
    assert not faults(finish(finished, *QUICK), finished, 0, None, "done")


def test_a_file_that_was_changed_in_place_has_another_digest_although_its_time_is_the_old_one(tmp_path):
    file, cache = tmp_path / "weights", Cache(tmp_path / "cache")
    file.write_bytes(b"1" * 100)
    then, first = file.stat(), cache.file_digest(file)
    assert cache.file_digest(file) == first
    with file.open("r+b") as opened:
        opened.write(b"2")
    os.utime(file, ns=(then.st_atime_ns, then.st_mtime_ns))
    assert file.stat().st_mtime_ns == then.st_mtime_ns and cache.file_digest(file) != first
