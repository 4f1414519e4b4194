"""From Hydra's configuration to plain values and live objects; everything that is wrong with a request is found here."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nla.budget.base import Budget, PlanEntry, make_plan
from nla.cache import Cache
from nla.errors import UserError, require_choice
from nla.methods.base import Method
from nla.models.causal_lm import DTYPES, CausalLM, Inventory
from nla.select import select_linears
from nla.track import Tracker
from tasks.language_modelling import LanguageModelling

INGREDIENTS = ["kernel", "solver", "data"]  # groups that reach a run only through `method` and `task`


@dataclass(frozen=True)
class Request:
    """A valid request: plain values for the record, objects for the work."""

    values: dict[str, Any]
    model: CausalLM
    inventory: Inventory
    method: Method
    plan: list[PlanEntry]
    task: LanguageModelling
    tracker: Tracker
    cache: Cache

    @property
    def device(self) -> str:
        return self.values["device"]

    def inputs(self) -> dict[str, str]:
        """Digests of local files the request names."""
        return {"model": self.model.identity(), "data": self.task.data.identity()}


def resolve(cfg: DictConfig) -> dict[str, Any]:
    """The fully resolved configuration, with every `auto` replaced by what it means on this machine.

    Raises:
        UserError: a device or type that is not there.
    """
    try:
        values: dict[str, Any] = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise UserError(str(error).splitlines()[0]) from error
    values["device"] = find_device(values["device"])
    require_choice("dtype", values["dtype"], list(DTYPES))
    for owner in (values["solver"], values["method"].get("solver", {})):
        if owner.get("products") == "auto":
            owner["products"] = "bfloat16" if has_matrix_units(values["device"]) else "float32"
    return {key: value for key, value in values.items() if key not in INGREDIENTS}


def find_device(asked: str) -> str:
    """The device that `device=` means here."""
    if asked == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(asked).type
    except (RuntimeError, TypeError):
        kind = ""
    if kind not in ("cpu", "cuda"):
        raise UserError(f"device={asked} is not known; allowed: auto, cpu, cuda, cuda:<number>")
    if kind == "cuda" and (torch.device(asked).index or 0) >= torch.cuda.device_count():
        raise UserError(f"device={asked} is not there: torch sees {torch.cuda.device_count()} GPUs; use device=cpu")
    return asked


def has_matrix_units(device: str) -> bool:
    """Whether bfloat16 products are several times faster than fp32 ones here: AMX on a CPU, Ampere or later on CUDA."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return torch.cpu._is_amx_tile_supported()


def prepare(cfg: DictConfig) -> Request:
    """Build and check everything that can be checked without weights.

    Raises:
        UserError: what is wrong, what is allowed, what to do.
    """
    values = resolve(cfg)
    cache = Cache(Path(values["cache_dir"]))
    method: Method = build("method", values)
    budget: Budget = build("budget", values)
    task: LanguageModelling = build("task", values)
    model: CausalLM = build("model", values)
    if not 0 < values["ratio"] < 1:
        raise UserError(f"ratio={values['ratio']} must lie between 0 and 1: it is the fraction of parameters that is removed")
    inventory = model.inventory(cache)
    chosen = select_linears(inventory.linears, values["select"]["include"], values["select"]["exclude"])
    plan = make_plan(chosen, values["ratio"], budget, method.kernel)
    task.check(inventory.max_positions)
    return Request(values, model, inventory, method, plan, task, build("track", values), cache)


def build(group: str, values: dict[str, Any]) -> Any:
    """The object that a group's `_target_` names."""
    try:
        return instantiate(values[group], _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(f"{group} cannot be built: {error}") from error
