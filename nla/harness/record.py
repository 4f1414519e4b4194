"""The record of a run: what was asked, where it ran, and every figure. `outputs/runs/<signature>/record.json`."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nla.machine.cache import digest, write_atomically
from nla.machine.errors import UserError
from nla.machine.provenance import code_digest, computing_packages, target_modules

SCHEMA: Literal[1] = 1
NOT_IN_SIGNATURE = ["track", "dry_run", "estimate", "outputs_dir", "cache_dir"]  # they change no figure


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="strings")


class FitRecord(Strict):
    """One matrix; see `nla.methods.base.Fit` for the meaning and unit of each figure."""

    name: str
    shape: tuple[int, int]
    terms: str
    n_params: int
    bits: int
    relative_error: float
    svd_error: float
    floor: float
    optimum: float | None
    weighted_error: float | None = None
    svd_llm_error: float | None = None
    weighted_floor: float | None = None
    steps: int
    flops: int
    seconds: float
    peak_bytes: int
    status: str


class Parameters(Strict):
    """Counts; ratio and model_ratio are removed fractions. Bytes are those of the parameters in the run's dtype."""

    selected_before: int
    selected_after: int
    model_before: int
    model_after: int
    ratio: float
    model_ratio: float
    bytes_before: int
    bytes_after: int


class PlanRecord(Strict):
    name: str
    bits: int
    terms: str


class KeptRecord(Strict):
    """Parameters of one matrix after its fit and after retraining; `ratio` is the fraction of the dense that is gone."""

    name: str
    fitted: int
    kept: int
    ratio: float


class RetrainRecord(Strict):
    """`history`: rows as in `nla.retrain.history`, about a hundred of them (steps.jsonl has all); `seconds` of all steps."""

    steps: int
    tokens: int | None  # that were trained on; None where samples are no text
    samples: int
    trained: int  # parameters that were moved
    optimiser_bytes: int
    importance_bytes: int
    dense_optimiser_bytes: int  # of AdamW on the whole dense model
    seconds: float
    history: list[dict[str, Any]]
    matrices: list[KeptRecord]


class RunRecord(Strict):
    """Schema 1. `seconds` and `peak_bytes` are by stage; metrics are {stage: {task: {data: {metric: value}}}}.

    Peak bytes are what one worker had alive beyond the weights (on CUDA: the process); resident bytes are a metric.
    """

    version: Literal[1] = Field(default=SCHEMA, alias="schema")
    signature: str
    status: Literal["running", "done", "failed"]
    error: str | None = None
    finished: str | None = None  # UTC, ISO 8601
    config: dict[str, Any]
    environment: dict[str, Any]
    plan: list[PlanRecord]
    parameters: Parameters | None = None
    fits: list[FitRecord] = []
    retraining: RetrainRecord | None = None
    metrics: dict[str, dict[str, dict[str, dict[str, float]]]] = {}
    seconds: dict[str, float] = {}
    peak_bytes: dict[str, int] = {}

    def write(self, folder: Path) -> None:
        write_atomically(folder / "record.json", self.model_dump_json(indent=1, by_alias=True).encode())


def read_record(path: Path) -> RunRecord:
    """A validated record.

    Raises:
        UserError: the file is not a record of this schema; it names the file and the field.
    """
    try:
        return RunRecord.model_validate_json(path.read_bytes())
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"]) or "the file"
        raise UserError(
            f"{path} is not a record of schema {SCHEMA}: {where}: {first['msg']}; delete it to run again"
        ) from error


def signature(config: dict[str, Any], inputs: dict[str, str]) -> str:
    """Name of a run: the resolved configuration, the contents of local inputs, and the code that computes figures."""
    asked = {key: value for key, value in config.items() if key not in NOT_IN_SIGNATURE}
    if "statistics" in asked:
        asked["statistics"] = {k: v for k, v in asked["statistics"].items() if k not in ("offload", "collect")}
    made_from = {
        "config": asked,
        "inputs": inputs,
        "code": code_digest("nla.pipeline", *target_modules(config)),
        "packages": computing_packages(),
    }
    return digest({"schema": SCHEMA, **made_from})[:16]


def write_line(file: Any, value: dict[str, Any]) -> None:
    """One line of a jsonl file, on disk when this returns."""
    file.write(json.dumps(value) + "\n")
    file.flush()
