"""What all tests share: the project's own configurations, its command line, and a real model's weights."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

# Two busy processes (pytest -n 2) with two threads each would fight for two cores; set before torch is imported.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["WANDB_MODE"] = "offline"

import pytest
import torch
from hydra import compose
from hydra.utils import instantiate
from hypothesis import settings as hypothesis_settings

from analysis.composed import hydra_of_conf
from tests import forked

signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell starts commands with & so that they ignore it
hypothesis_settings.register_profile("same every time", derandomize=True)  # a test that fails fails again
hypothesis_settings.load_profile("same every time")

ROOT = Path(__file__).resolve().parent.parent
CONF = ROOT / "conf"
TINY = ["model=tiny_llama", "task.window=64", "task.max_windows=3", "track=none"]
# methods whose numbers take fewer bits than the model's type
QUANTISED = {
    "rtn", "gptq", "quip", "lq_lora", "eora", "svdquant", "caldera", "nla_angles", "nla_levels", "svd_llm_int4",
}  # fmt: skip
ENCODED: dict[tuple[str, str], torch.Tensor] = {}
SHORT = [*TINY, "solver.steps=0", "kernel=linear", "ratio=0.5", "retrain.length=64", "retrain.watch=4", "retrain.checkpoint=4"]


def options(group: str) -> list[str]:
    """Every yaml of a configuration group: a new one is tested without a new test."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def configuration(*overrides: str):
    return deepcopy(composed(*overrides))


@cache
def composed(*overrides: str):
    with hydra_of_conf():
        return compose("config", overrides=list(overrides))


def make_kernel(*overrides: str):
    return instantiate(configuration(*overrides).kernel)


def make_model(name: str, folder: Path):
    """A model of conf/model in fp32 on the CPU, with a cache in this folder."""
    from nla.machine.cache import Cache

    return instantiate(configuration(f"model={name}").model, _convert_="all").load("cpu", "float32", Cache(folder))


KERNELS = {name: (f"kernel={name}",) for name in options("kernel")}
KERNELS |= {f"spline{d}": ("kernel=spline", f"kernel.degree={d}") for d in (1, 3)}


@pytest.fixture(params=KERNELS, ids=str)
def kernel(request):
    return make_kernel(*KERNELS[request.param])


@pytest.fixture(autouse=True)
def same_random_numbers() -> None:
    """What a test draws without a generator of its own is the same every time."""
    torch.manual_seed(0)


@pytest.fixture
def cli(tmp_path) -> Callable[..., subprocess.CompletedProcess]:
    """`python run.py ...` as a user types it, with its outputs in a temporary folder: forked, or a `fresh` Python."""

    def run(
        *arguments: str, check: bool = True, fresh: bool = False, environment: dict[str, str] | None = None
    ) -> subprocess.CompletedProcess:
        asked = command(tmp_path, *arguments)
        if fresh:
            result = subprocess.run([sys.executable, *asked], **settings(environment))
        else:
            result = forked.finish(asked, environment)
        assert not check or result.returncode == 0, result.stdout + result.stderr
        return result

    return run


@pytest.fixture
def run_here(tmp_path, monkeypatch) -> Callable[..., object]:
    """The same without a process of its own, for what the command line does not change: nla.pipeline.run.

    Figures are made but not painted, and a long text that was read by the same tokeniser before is not read again.
    """
    from matplotlib.figure import Figure

    from nla.harness.settings import check_settings
    from nla.models.base import LanguageModel
    from nla.pipeline import run

    encode = LanguageModel.encode

    def encode_once(model: LanguageModel, text: str):
        if len(text) < 100_000:
            return encode(model, text)
        key = model.tokenizer.backend_tokenizer.to_str(), text
        if key not in ENCODED:
            ENCODED[key] = encode(model, text)
        return ENCODED[key]

    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: path.touch())
    monkeypatch.setattr(LanguageModel, "encode", encode_once)
    return lambda *arguments: run(check_settings(configuration(*command(tmp_path, *arguments)[1:])))


def command(outputs: Path, *arguments: str) -> list[str]:
    """What follows `python`."""
    own = any(a.startswith("outputs_dir=") for a in arguments)
    return ["run.py", *arguments, *([] if own else [f"outputs_dir={outputs}"])]


def settings(environment: dict[str, str] | None = None) -> dict:
    return {"cwd": ROOT, "capture_output": True, "text": True, "env": os.environ | (environment or {}), "timeout": 300}


def records(outputs: Path) -> list[dict]:
    """The records of all runs, each with the rows of its table as `fits` and its steps as `history`."""
    return [whole_record(path.parent) for path in sorted((outputs / "runs").glob("*/record.json"))]


def whole_record(folder: Path) -> dict:
    from nla.harness.record import read_history, read_record

    fits = [vars(fit) for fit in read_record(folder).fits]
    return json.loads((folder / "record.json").read_text()) | {"fits": fits, "history": read_history(folder)}


def only_record(outputs: Path) -> dict:
    (record,) = records(outputs)
    return record


def only_folder(outputs: Path) -> Path:
    (path,) = (outputs / "runs").glob("*/record.json")
    return path.parent


def figures(record: dict) -> dict:
    """A record without what may differ between two runs of the same request: times, threads, folders, and so its seal."""
    record = json.loads(json.dumps(record))
    for key in ("seconds", "environment", "command", "started", "finished", "seal"):
        del record[key]
    for key in ("outputs_dir", "cache_dir"):
        del record["config"][key]
    for fit in record["fits"]:
        del fit["seconds"]
    for tasks in record["metrics"].values():
        for sets in tasks.values():
            for name, metrics in sets.items():
                sets[name] = {metric: figure for metric, figure in metrics.items() if "second" not in metric}
    return record


def save_as_folder(model: str, folder: Path) -> Path:
    """A folder with the model of an option of conf/model, as transformers or timm save it."""
    from timm.models import save_for_hf

    from nla.machine.cache import Cache

    loaded = instantiate(configuration(f"model={model}").model, _convert_="all").load("cpu", "float32", Cache(folder))
    if loaded.reads == "text":
        loaded.module.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
    else:
        save_for_hf(loaded.module, folder, safe_serialization=True)
    return folder


@pytest.fixture(scope="session")
def of_model(tmp_path_factory) -> Callable[[str], list[str]]:
    """The arguments that choose an option of conf/model. One without an architecture gets a folder and fitting data."""
    folders: dict[str, list[str]] = {}

    def arguments(name: str) -> list[str]:
        model = composed(f"model={name}").model
        if "path" not in model or model.name is not None:
            return [f"model={name}"]
        if name not in folders:
            small, data = ("tiny_swin", "digits") if model._target_.endswith("TimmModel") else ("tiny_llama", "sotu")
            folder = save_as_folder(small, tmp_path_factory.mktemp(name))
            folders[name] = [f"model={name}", f"model.path={folder}", f"data={data}"]
        return folders[name]

    return arguments


@pytest.fixture(scope="session")
def smollm2():
    """name -> fp32 weight of SmolLM2-135M, from the project's own cache (fetched and converted on first use)."""
    from safetensors import safe_open

    from nla.machine.cache import Cache

    model = instantiate(configuration("model=smollm2_135m").model)
    with safe_open(model.folder(Cache(ROOT / "outputs" / "cache")) / "model.safetensors", "pt") as file:
        yield lambda name: file.get_tensor(f"model.layers.{name}.weight")
