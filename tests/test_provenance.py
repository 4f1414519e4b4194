"""Code digests: they follow imports, see every change of a statement, and refuse a module that is not there."""

import re
from types import SimpleNamespace

import pytest

from nla.machine import provenance
from tests.conftest import ROOT

FILES = {
    "nla/__init__.py": '"""A package."""',
    "nla/kernels/__init__.py": "",
    "nla/kernels/base.py": '"""Kernels."""\n\n\nclass Kernel:\n    """A kernel."""\n\n    rate = 1  # a number\n',
    "nla/kernels/phase.py": "from nla.kernels.base import Kernel\n\n\nclass Phase(Kernel):\n    pass\n",
    "nla/kernels/other.py": "from nla.kernels.base import Kernel\n",
    "nla/fits.py": "def fit():\n    from nla.kernels import phase\n\n    return phase\n",
}


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A small project under ROOT, and its digest of nla.fits."""
    monkeypatch.setattr(provenance, "ROOT", tmp_path)
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)

    def digest_of(module: str = "nla.fits") -> str:
        for function in (provenance.code_digest, provenance.read):
            function.cache_clear()
        return provenance.code_digest(module)

    yield SimpleNamespace(root=tmp_path, digest=digest_of)
    for function in (provenance.code_digest, provenance.read):
        function.cache_clear()


def test_a_change_in_a_module_that_is_imported_through_others_changes_the_digest(project):
    before = project.digest()
    file = project.root / "nla/kernels/base.py"
    file.write_text(file.read_text().replace("rate = 1", "rate = 2"))
    assert project.digest() != before


def test_comments_and_docstrings_and_modules_that_are_not_imported_do_not_change_it(project):
    before = project.digest()
    file = project.root / "nla/kernels/base.py"
    file.write_text(file.read_text().replace("# a number", "# a rate").replace("A kernel.", "One kernel."))
    (project.root / "nla/kernels/other.py").write_text("rate = 3\n")
    assert project.digest() == before


def test_a_file_that_is_renamed_is_refused_until_its_importers_know_and_is_a_new_digest_then(project):
    before = project.digest()
    (project.root / "nla/kernels/phase.py").rename(project.root / "nla/kernels/angle.py")
    with pytest.raises(RuntimeError, match=r"nla\.kernels\.phase, which is not there"):
        project.digest("nla.kernels.phase")
    (project.root / "nla/fits.py").write_text(FILES["nla/fits.py"].replace("phase", "angle"))
    assert project.digest() != before


def test_every_module_that_a_digest_is_asked_for_by_name_is_there():
    """The dotted names in calls of code_digest, and every `_target_` of conf/."""
    calls = [call for file in (ROOT / "nla").rglob("*.py") for call in re.findall(r"code_digest\(([^)]*)\)", file.read_text())]
    named = {name for call in calls for name in re.findall(r'"(nla[\w.]*)"', call)}
    yamls = [path.read_text() for path in (ROOT / "conf").rglob("*.yaml")]
    classes = {target for text in yamls for target in re.findall(r"_target_: ((?:nla|tasks)\S+)", text)}
    assert len(named) >= 4 and len(classes) >= 30
    for module in named | {target.rpartition(".")[0] for target in classes}:
        assert provenance.source(module).is_file()


def test_no_folder_is_imported_by_a_folder_that_it_imports():
    """Imports run one way between the folders of nla/, tasks/ and the files beside them."""
    arrows: dict[str, set[str]] = {}
    for file in [*(ROOT / "nla").rglob("*.py"), *(ROOT / "tasks").rglob("*.py")]:
        for other in provenance.read(file)[1]:
            a, b = room(file), room(other)
            if a != b and other.name != "__init__.py":
                arrows.setdefault(a, set()).add(b)

    def reach(start: str) -> set[str]:
        found, waiting = set(), list(arrows.get(start, ()))
        while waiting:
            new = waiting.pop()
            if new not in found:
                found.add(new)
                waiting += arrows.get(new, ())
        return found

    assert {"nla/kernels", "nla/matrix", "nla/machine"} <= reach("nla/pipeline.py")
    assert {start for start in arrows if start in reach(start)} == set()


def room(file) -> str:
    parts = file.relative_to(ROOT).parts
    return "tasks" if parts[0] == "tasks" else "/".join(parts[:2])
