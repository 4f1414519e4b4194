"""The origin of a result: digests of the code that computes it, versions of packages, and the machine."""

import ast
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from nla.machine.cache import digest

ROOT = Path(__file__).resolve().parents[2]
PROJECT = ("nla", "tasks")  # packages whose code computes results
COMPUTING = ["torch", "torchvision", "transformers", "timm", "lm_eval"]
PACKAGES = [*COMPUTING, "accelerate", "datasets", "hydra-core", "wandb", "safetensors", "numpy"]


@cache
def code_digest(*modules: str) -> str:
    """Digest of these modules of the project and of all project modules that they import, directly or indirectly.

    Cached results are stored under it, so that changed code computes them again. Comments and docstrings do not change it.

    Args:
        modules: dotted names, such as `nla.kernels.phase`.

    Raises:
        RuntimeError: a module does not exist. The message names it.
    """
    found: set[Path] = set()
    waiting = [source(module) for module in modules]
    while waiting:
        file = waiting.pop()
        if file not in found:
            found.add(file)
            waiting += read(file)[1]
    return digest({str(file.relative_to(ROOT)): read(file)[0] for file in found})


def source(module: str) -> Path:
    """The file of a module of the project."""
    path = ROOT.joinpath(*module.split("."))
    for file in (path.with_suffix(".py"), path / "__init__.py"):
        if file.is_file():
            return file
    raise RuntimeError(f"results depend on the code of {module}, which is not there: {path}.py; correct the name")


@cache
def read(file: Path) -> tuple[str, tuple[Path, ...]]:
    """Digest of a file, and the files of the project that it imports."""
    tree = ast.parse(file.read_bytes())
    return statements(tree), imported(tree)


def statements(tree: ast.Module) -> str:
    """Digest of a syntax tree without docstrings."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
    return digest(ast.dump(tree))


def imported(tree: ast.Module) -> tuple[Path, ...]:
    """Project files that are imported, at module level or inside functions, and the `__init__.py` of their packages."""
    found: list[Path] = []
    for name in imported_names(tree):
        parts = name.split(".")
        if parts[0] in PROJECT:
            found += [source(".".join(parts[:i])) for i in range(1, len(parts) + 1)]
    return tuple(found)


def imported_names(tree: ast.Module) -> Iterator[str]:
    """Dotted names of the modules in all import statements."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            for alias in node.names:
                folder = ROOT.joinpath(*node.module.split("."))
                if (folder / f"{alias.name}.py").is_file() or (folder / alias.name / "__init__.py").is_file():
                    yield f"{node.module}.{alias.name}"


def target_modules(settings: Any) -> list[str]:
    """Sorted names of the project modules that a configuration names under `_target_`, at any depth."""
    return sorted({target.rpartition(".")[0] for target in targets(settings) if target.partition(".")[0] in PROJECT})


def targets(settings: Any) -> Iterator[str]:
    if isinstance(settings, dict):
        if "_target_" in settings:
            yield settings["_target_"]
        settings = list(settings.values())
    if isinstance(settings, list):
        for value in settings:
            yield from targets(value)


@cache
def computing_packages() -> dict[str, str]:
    """Versions of the packages that can change figures: those that compute, and lm_eval, which defines tasks."""
    return versions(COMPUTING)


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Installed versions; `absent` where a package is not installed."""
    found = {}
    for package in packages:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def environment(device: str) -> dict[str, Any]:
    """The environment of a run: commit, Python, packages, device and threads."""
    import torch

    return {
        "commit": git("rev-parse", "HEAD"),
        "dirty": bool(git("status", "--porcelain")),
        "python": platform.python_version(),
        "packages": versions(PACKAGES),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else processor(),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
    }


def git(*arguments: str) -> str:
    """Output of a git command in the project, or an empty string if the project is not a git checkout."""
    try:
        result = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return ""
    return result.stdout.strip()


def processor() -> str:
    """The CPU's name and its widest vector instructions."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":")[1].strip() for line in lines if "model name" in line]
    return f"{names[0] if names else platform.processor() or 'CPU'} ({torch.backends.cpu.get_cpu_capability()})"
