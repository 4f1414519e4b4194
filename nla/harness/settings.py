"""Checks the plain values at the top of the configuration, before heavy packages are imported."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError, OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nla.machine.errors import UserError
from tasks.data import SETS

Group = dict[str, Any]
Statistic = Literal["gram", "magnitude", "fisher"]
DEFAULT_RATIO = 0.7


class Select(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include: str
    exclude: str | None


class Statistics(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    data: Group
    windows: Annotated[int, Field(ge=1, le=1_000_000)]
    length: Annotated[int, Field(ge=2)]
    fisher_windows: Annotated[int, Field(ge=1, le=1_000_000)]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    offload: bool
    collect: list[Statistic]


class Estimate(BaseModel):
    model_config = ConfigDict(extra="forbid")
    device: str
    flops: Annotated[float, Field(gt=0)]
    used: Annotated[float, Field(gt=0, le=1)]


class Settings(BaseModel):
    """The schema of conf/config.yaml, without Hydra's own settings."""

    model_config = ConfigDict(extra="forbid")
    ratio: Annotated[
        Annotated[float, Field(gt=0, lt=1)] | None, Field(description="the fraction of parameters that is removed")
    ]
    bits: Annotated[
        Annotated[float, Field(gt=0)] | None, Field(description="the average number of bits per weight of the selected layers")
    ]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    device: str
    dtype: Literal["float32", "bfloat16", "float16"]
    prompt: Annotated[str, Field(min_length=1)] | None
    save: bool | str | None
    select: Select
    forward: Literal["triplets", "reconstruct"]
    statistics: Statistics
    dry_run: bool
    estimate: Estimate
    outputs_dir: str
    cache_dir: str
    model: Group
    method: Group
    kernel: Group
    solver: Group
    storage: Group
    budget: Group
    schedule: Group
    refine: Group
    retrain: Group
    task: Group
    data: Group
    calibration: Group | None = None  # none: the data's own training split
    track: Group


def check_settings(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain values.

    Raises:
        UserError: a value is missing or not allowed. The message names the setting.
    """
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        require_plain(values)
        return with_model_name(with_one_target(Settings.model_validate(values).model_dump()))
    except InterpolationKeyError as error:
        for kind, choices in SETS.items():
            if f"'data.{kind}'" in str(error):
                raise UserError(
                    f"task={cfg_task(cfg)} needs {kind}: data={choices}; several tasks may take several, data=[sotu,everyday]"
                ) from error
        raise UserError(f"{error.full_key} cannot be read: {str(error).splitlines()[0]}") from error
    except OmegaConfBaseException as error:
        raise UserError(f"{error.full_key} cannot be read: {str(error).splitlines()[0]}") from error
    except ValidationError as error:
        first = error.errors()[0]
        setting = ".".join(map(str, first["loc"]))
        field = Settings.model_fields.get(setting)
        if first["type"] == "missing":
            raise UserError(f"{setting} is missing; take ~{setting} off the command line") from error
        meaning = f" ({field.description})" if field and field.description else ""
        raise UserError(f"{setting}={first['input']} is not allowed{meaning}: {first['msg'].lower()}") from error


def require_plain(values: Any, setting: str = "") -> None:
    """Raise UserError, which names the setting, for a value that no setting can have, at any depth.

    These are numbers that are not finite, whole numbers beyond 64 bits, and names of files and folders that are empty, which
    would be the current folder.
    """
    if isinstance(values, dict | list):
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            require_plain(value, f"{setting}.{key}" if setting else str(key))
    elif isinstance(values, float) and not math.isfinite(values):
        raise UserError(f"{setting}={values} is not allowed: it must be a finite number")
    elif isinstance(values, int) and abs(values) >= 2**63:
        raise UserError(f"{setting}={values} is not allowed: whole numbers are below {2**63}")
    elif values == "" and setting.endswith(("path", "_dir")):
        raise UserError(f"{setting}= is empty; name a file or folder, or leave it out")


def with_one_target(values: dict[str, Any]) -> dict[str, Any]:
    """The settings with exactly one of `ratio` and `bits`. If both are None, ratio is 0.7.

    Raises:
        UserError: both are given.
    """
    if values["ratio"] is not None and values["bits"] is not None:
        raise UserError(
            f"ratio={values['ratio']} and bits={values['bits']} are both given, and each says how much is kept; "
            "give one of them (ratio=null removes that of an experiment)"
        )
    return values | {"ratio": DEFAULT_RATIO} if values["ratio"] is None and values["bits"] is None else values


def with_model_name(values: dict[str, Any]) -> dict[str, Any]:
    """The settings, in which a model without a name has that of its folder or, without its ending, of its file."""
    model = values["model"]
    if model.get("name") is not None or model.get("path") is None:
        return values
    path = Path(str(model["path"])).expanduser().resolve()
    return values | {"model": model | {"name": path.name if path.is_dir() else path.stem}}


def cfg_task(cfg: DictConfig) -> str:
    """The names of the tasks that were asked for."""
    return ",".join(str(name) for name, value in cfg.task.items_ex(resolve=False) if isinstance(value, DictConfig))
