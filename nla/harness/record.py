"""The record of a run in `outputs/runs/<readable name>-<signature>/`: its settings, environment and figures."""

import json
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nla.harness.fits_table import FitRecord, first_problem, fits_text, read_fits
from nla.machine.cache import digest
from nla.machine.errors import UserError
from nla.machine.files import append_line, write_atomically
from nla.machine.provenance import code_digest, computing_packages, target_modules

SCHEMA: Literal[2] = 2
NOT_IN_SIGNATURE = ["track", "dry_run", "estimate", "outputs_dir", "cache_dir", "save"]  # they change no figure


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class Parameters(Strict):
    """Numbers of parameters before and after compression. ratio and model_ratio are the removed fractions."""

    selected_before: int
    selected_after: int
    model_before: int
    model_after: int
    ratio: float
    model_ratio: float


class Bits(Strict):
    """Storage: bits per weight of the selected matrices at the end, and bytes of all parameters before and after."""

    selected_per_weight: float
    model_bytes_before: int
    model_bytes_after: int


class RetrainRecord(Strict):
    """Size and cost of a retraining. `seconds` is the sum over all steps."""

    steps: int
    tokens: int | None  # None for images
    samples: int
    trained: int  # number of parameters that the optimiser changed at once
    optimiser_bytes: int
    importance_bytes: int
    dense_optimiser_bytes: int  # that AdamW would take to train the whole dense model
    seconds: float


class RefineRecord(Strict):
    """Summary of the refinement of blocks. `refine.jsonl` has a line for each block (`nla.refine.block.Refined`).

    `error_before` and `error_after` are means over the blocks of the relative squared error of a block's outputs for held-out
    calibration samples.
    """

    blocks: int
    error_before: float
    error_after: float
    steps: int
    trained: int  # number of parameters that were trained, in all blocks
    seconds: float


class MadeFrom(Strict):
    """The origin of a run's figures, part of the signature: digests of the inputs and of the code, and versions of packages."""

    inputs: dict[str, str]
    code: str
    packages: dict[str, str]


class RunRecord(Strict):
    """The record of a run (schema 2): the fields of `record.json`, and `fits` and `history` from files beside it.

    Attributes:
        command: the command line; for a job of a sweep, with its own settings; None without a command line.
        started, finished: UTC, ISO 8601.
        metrics: {stage: {task: {data: {metric: value}}}}.
        continuations: {stage: what a language model wrote after the prompt of `config`}.
        seconds: wall time of each stage.
        peak_bytes: peak memory of one worker in each stage, without the weights (on CUDA: of the process).
        saved: the folder in which the run saved its model.
        fits: the rows of `fits.csv`.
        history: the rows of `steps.jsonl`, see `nla.retrain.history`.
        seal: digest of all other fields and of `fits.csv`, by which a change is noticed; None in git, which notices it itself.
    """

    version: Literal[2] = Field(default=SCHEMA, alias="schema")
    signature: str
    status: Literal["running", "done", "failed"]
    error: str | None = None
    command: str | None = None
    started: str | None = None
    finished: str | None = None
    metrics: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    continuations: dict[str, str] = {}
    parameters: Parameters | None = None
    bits: Bits | None = None
    seconds: dict[str, float] = {}
    peak_bytes: dict[str, int] = {}
    refinement: RefineRecord | None = None
    retraining: RetrainRecord | None = None
    saved: str | None = None
    made_from: MadeFrom | None = None
    environment: dict[str, Any]
    config: dict[str, Any]
    seal: str | None = None
    fits: list[FitRecord] = Field(default=[], exclude=True)
    history: list[dict[str, Any]] = Field(default=[], exclude=True)

    @property
    def name(self) -> str:
        return run_name(self.config, self.signature)

    def write(self, folder: Path) -> None:
        """Write `fits.csv` and `record.json`.

        The fits are written first, since no record is read without them. When a finished run begins again, its record is: a
        stop between the two files must not leave a finished record without its fits.
        """
        self.seal = seal_of(self.model_dump(mode="json", by_alias=True), self.fits)
        files = {
            "fits.csv": fits_text(self.fits).encode(),
            "record.json": self.model_dump_json(indent=2, by_alias=True).encode() + b"\n",
        }
        again = self.status != "done" and (folder / "record.json").exists()
        for name in reversed(files) if again else files:
            write_atomically(folder / name, files[name])


def seal_of(values: dict[str, Any], fits: list[FitRecord]) -> str:
    """The digest of all values of a `record.json` but its seal, and of the table of fits.

    The values are those of the file, so that a record stays valid when later versions have more fields.
    """
    return digest([{name: value for name, value in values.items() if name != "seal"}, fits_text(fits)])


def finished_record(folder: Path, signature: str) -> RunRecord | None:
    """The record of the run with this signature, or None if it has not finished. Nothing is written.

    Raises:
        UserError: the record is damaged or was changed.
    """
    if not (folder / "record.json").exists():
        return None
    record = read_values(folder / "record.json")
    return read_record(folder) if record.status == "done" and record.signature == signature else None


def read_record(folder: Path) -> RunRecord:
    """The validated record of a run's folder, with its fits and without its history (see `read_history`).

    Raises:
        UserError: a file is missing, or does not have this schema, or a finished run's record is not as the run wrote it. The
            message names the file and the field.
    """
    path = folder / "record.json"
    record = read_values(path)
    record.fits = read_fits(folder / "fits.csv")
    if record.status == "done":
        lacking = [name for name in ("parameters", "bits", "metrics", "fits") if not getattr(record, name)]
        if lacking:
            raise UserError(f"{path} is of a finished run without {' and '.join(lacking)}; delete its folder to run again")
        if record.seal not in (None, seal_of(json.loads(path.read_bytes()), record.fits)):
            raise UserError(f"{path} or fits.csv beside it was changed after the run; delete its folder to run again")
    return record


def read_values(path: Path) -> RunRecord:
    """The fields of a `record.json`.

    Raises:
        UserError: it is missing, or does not have this schema. The message names the file and the field.
    """
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error}); delete its folder to run again") from error
    except ValidationError as error:
        raise UserError(f"{path} is not a record of schema {SCHEMA}: {first_problem(error)}; delete it to run again") from error


def read_history(folder: Path) -> list[dict[str, Any]]:
    """The history of a run's retraining (`steps.jsonl`), or an empty list without retraining.

    Raises:
        UserError: a line is damaged. The message names the file and the line.
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
    bits = config.get("bits")
    parts = [config["model"]["name"], *method_names(config)]
    parts.append(f"{config['ratio']:g}" if bits is None else f"{bits:g}bits")
    budget = module_name(config["budget"])
    parts += [budget] * (budget != "uniform")
    parts += ["refined"] * bool(config.get("refine")) + ["retrained"] * ("retrain" in config)
    parts.append(signature[:8])
    return "-".join(re.sub(r"[^\w.]+", "_", part, flags=re.ASCII).strip(".")[:40] for part in parts)


def method_names(config: dict[str, Any]) -> list[str]:
    """The names of the method, of its kernel and of its storage in few bits, if it has them: `["nla", "phase", "angle3"]`."""
    method = config["method"]
    names = [module_name(settings) for settings in (method, method.get("kernel")) if settings]
    storage = method.get("storage") or {}
    return [*names, f"{storage['kind']}{storage['width'] or ''}"] if "kind" in storage else names


def module_name(settings: dict[str, Any]) -> str:
    """Last part of the module name in a group's `_target_`: `svd_llm` for `nla.methods.svd_llm.SVDLLM`."""
    return settings["_target_"].split(".")[-2]


def make_up(config: dict[str, Any], inputs: dict[str, str]) -> MadeFrom:
    """Digests of inputs and code, and versions of packages, on which the figures of this configuration depend."""
    code = code_digest("nla.pipeline", *target_modules(config))
    return MadeFrom(inputs=inputs, code=code, packages=computing_packages())


def signature(config: dict[str, Any], made_from: MadeFrom) -> str:
    """Digest that identifies a run: the configuration, without settings that change no figure, and `made_from`."""
    asked = {key: value for key, value in config.items() if key not in NOT_IN_SIGNATURE}
    if "statistics" in asked:
        asked["statistics"] = {k: v for k, v in asked["statistics"].items() if k not in ("offload", "collect")}
    return digest({"schema": SCHEMA, "config": asked, **made_from.model_dump()})[:16]


def write_line(path: Path, value: dict[str, Any]) -> None:
    """Add a line to a jsonl file."""
    append_line(path, json.dumps(value))
