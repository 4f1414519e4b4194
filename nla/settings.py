"""The plain values at the top of the configuration, checked before anything heavy is imported."""

from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nla.errors import UserError

Group = dict[str, Any]


class Select(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)
    include: str
    exclude: str | None


class Settings(BaseModel):
    """conf/config.yaml without Hydra's own part."""

    model_config = ConfigDict(extra="forbid")
    ratio: Annotated[float, Field(gt=0, lt=1, description="the fraction of parameters that is removed")]
    seed: Annotated[int, Field(ge=0, lt=2**63)]
    device: str
    dtype: Literal["float32", "bfloat16", "float16"]
    select: Select
    dry_run: bool
    outputs_dir: str
    cache_dir: str
    model: Group
    method: Group
    kernel: Group
    solver: Group
    budget: Group
    task: Group
    data: Group
    track: Group


def check_settings(cfg: DictConfig) -> dict[str, Any]:
    """The resolved configuration as plain values.

    Raises:
        UserError: a value is missing or not allowed; it names the setting.
    """
    try:
        values = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
        return Settings.model_validate(values).model_dump()
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from error
    except ValidationError as error:
        first = error.errors()[0]
        setting = ".".join(map(str, first["loc"]))
        field = Settings.model_fields.get(setting)
        meaning = f" ({field.description})" if field and field.description else ""
        raise UserError(f"{setting}={first['input']} is not allowed{meaning}: {first['msg'].lower()}") from error
