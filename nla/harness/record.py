"""The record of a run: what was asked, where it ran, and every figure. `outputs/runs/<readable name>-<signature>/`."""

import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nla.harness.fits_table import FitRecord, first_problem, read_fits, write_fits
from nla.machine.cache import digest, write_atomically
from nla.machine.errors import UserError
from nla.machine.provenance import code_digest, computing_packages, target_modules

SCHEMA: Literal[2] = 2
NOT_IN_SIGNATURE = ["track", "dry_run", "estimate", "outputs_dir", "cache_dir"]  # they change no figure


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Parameters(Strict):
    """Counts; ratio and model_ratio are removed fractions."""

    selected_before: int
    selected_after: int
    model_before: int
    model_after: int
    ratio: float
    model_ratio: float


class Bits(Strict):
    """What storing takes: bits per weight of the selected matrices at the end, bytes of the whole model's parameters."""

    selected_per_weight: float
    model_bytes_before: int
    model_bytes_after: int


class RetrainRecord(Strict):
    """What retraining took; `seconds` are of all steps."""

    steps: int
    tokens: int | None  # that were trained on; None where samples are no text
    samples: int
    trained: int  # parameters that were moved
    optimiser_bytes: int
    importance_bytes: int
    dense_optimiser_bytes: int  # of AdamW on the whole dense model
    seconds: float


class MadeFrom(Strict):
    """What the signature was made from, beside `config`: digests of local inputs and of the code, versions of packages."""

    inputs: dict[str, str]
    code: str
    packages: dict[str, str]


class RunRecord(Strict):
    """Schema 2: `record.json`, and what is in files beside it.

    Attributes:
        command: as typed, in a sweep with the job's own settings; None where there was no command line.
        started, finished: UTC, ISO 8601.
        metrics: {stage: {task: {data: {metric: value}}}}; resident bytes are a metric.
        seconds, peak_bytes: by stage; what one worker had alive beyond the weights (on CUDA: the process).
        fits: the rows of `fits.csv`.
        history: rows as in `nla.retrain.history`; `steps.jsonl` has them.
    """

    version: Literal[2] = Field(default=SCHEMA, alias="schema")
    signature: str
    status: Literal["running", "done", "failed"]
    error: str | None = None
    command: str | None = None
    started: str | None = None
    finished: str | None = None
    metrics: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    parameters: Parameters | None = None
    bits: Bits | None = None
    seconds: dict[str, float] = {}
    peak_bytes: dict[str, int] = {}
    retraining: RetrainRecord | None = None
    made_from: MadeFrom | None = None
    environment: dict[str, Any]
    config: dict[str, Any]
    fits: list[FitRecord] = Field(default=[], exclude=True)
    history: list[dict[str, Any]] = Field(default=[], exclude=True)

    @property
    def name(self) -> str:
        return run_name(self.config, self.signature)

    def write(self, folder: Path) -> None:
        """Write `fits.csv` and `record.json`."""
        write_fits(folder / "fits.csv", self.fits)
        write_atomically(folder / "record.json", self.model_dump_json(indent=2, by_alias=True).encode() + b"\n")


def read_record(folder: Path) -> RunRecord:
    """The validated record of a run's folder, with its fits and without its history (see `read_history`).

    Raises:
        UserError: a file is missing, or is not of this schema; it names the file and the field.
    """
    path = folder / "record.json"
    try:
        record = RunRecord.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); delete its folder to run again") from error
    except ValidationError as error:
        raise UserError(f"{path} is not a record of schema {SCHEMA}: {first_problem(error)}; delete it to run again") from error
    record.fits = read_fits(folder / "fits.csv")
    return record


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The steps of a retraining (`steps.jsonl`), empty where nothing was retrained.

    Raises:
        UserError: a line is damaged; it names the file and the line.
    """
    path, rows = folder / "steps.jsonl", []
    for number, line in enumerate(path.read_text().splitlines() if path.exists() else [], 1):
        try:
            rows.append(json.loads(line))
        except ValueError as error:
            raise UserError(f"{path} is damaged: line {number}: {error}; delete its folder to run again") from error
    return rows


def run_name(config: dict[str, Any], signature: str) -> str:
    """Name of a run's folder, such as `smollm2_135m-nla-piecewise-0.7-adaptive-retrained-1288f677`."""
    method, bits = config["method"], config.get("bits")
    parts = [config["model"]["name"], module_name(method)]
    if "kernel" in method:
        parts.append(module_name(method["kernel"]))
    parts.append(f"{config['ratio']:g}" if bits is None else f"{bits:g}bits")
    budget = module_name(config["budget"])
    parts += [budget] * (budget != "uniform") + ["retrained"] * ("retrain" in config) + [signature[:8]]
    return "-".join(re.sub(r"[^\w.]+", "_", part, flags=re.ASCII).strip(".")[:40] for part in parts)


def module_name(settings: dict[str, Any]) -> str:
    """The last part of the module that holds the class which the settings name: `svd_llm` of `nla.methods.svd_llm.SVDLLM`."""
    return settings["_target_"].split(".")[-2]


def make_up(config: dict[str, Any], inputs: dict[str, str]) -> MadeFrom:
    """What figures of this configuration come from: the contents of local inputs, and the code and packages that compute."""
    code = code_digest("nla.pipeline", *target_modules(config))
    return MadeFrom(inputs=inputs, code=code, packages=computing_packages())


def signature(config: dict[str, Any], made_from: MadeFrom) -> str:
    """Digest of a run: the resolved configuration, without what changes no figure, and what it is made from."""
    asked = {key: value for key, value in config.items() if key not in NOT_IN_SIGNATURE}
    if "statistics" in asked:
        asked["statistics"] = {k: v for k, v in asked["statistics"].items() if k not in ("offload", "collect")}
    return digest({"schema": SCHEMA, "config": asked, **made_from.model_dump()})[:16]


def write_line(file: Any, value: dict[str, Any]) -> None:
    """One line of a jsonl file, on disk when this returns."""
    file.write(json.dumps(value) + "\n")
    file.flush()
