"""Turns Hydra's configuration into plain values and objects, and checks the request before the work begins."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from nla.budget.base import Budget, Target
from nla.budget.measured import MeasuredBudget
from nla.budget.plan import Plan, make_plan, without_linear_term
from nla.harness.checks import check_gradients, check_masks, check_refinement, check_retraining, check_samples, check_sharing
from nla.harness.track import Tracker
from nla.machine.cache import Cache
from nla.machine.device import find_device, has_fast_bfloat16
from nla.machine.errors import UserError
from nla.methods.base import Method
from nla.models.base import DTYPES, Inventory, ModelSource
from nla.models.select import select_linears
from nla.refine.settings import Refinement
from nla.retrain.settings import Retraining
from tasks.base import Task
from tasks.data.base import Data, require_apart, training_set

# groups that a run has only inside other groups
INGREDIENTS = ["kernel", "solver", "storage", "data", "calibration", "schedule"]


@dataclass(frozen=True)
class PreparedRun:
    """A checked request: plain values for the record, and objects that do the work.

    Attributes:
        settings: the settings from which all other attributes were built.
        values: the settings for the record, resolved for this machine and without groups that this request does not use.
        calibration: data from which method, budget and refinement get samples; None if they need none.
        refinement: how blocks are refined after their fits; None for refine=none.
    """

    settings: dict[str, Any]
    values: dict[str, Any]
    model: ModelSource
    inventory: Inventory
    method: Method
    budget: Budget
    target: Target
    plan: Plan
    tasks: list[Task]
    calibration: Data | None
    refinement: Refinement | None
    retraining: Retraining
    tracker: Tracker
    cache: Cache

    @property
    def device(self) -> str:
        return self.values["device"]

    @property
    def dense_needs(self) -> frozenset[str]:
        """Statistics of the dense model's inputs that method and budget read."""
        if self.method.sequential and not isinstance(self.budget, MeasuredBudget):
            return self.budget.needs
        return self.budget.needs | self.method.needs

    @property
    def watched(self) -> Task | None:
        """The task on whose data retraining shows its progress: the first with data that the model can read, or None."""
        if not self.retraining.steps or not self.retraining.watch:
            return None
        return next((task for task in self.tasks if task.data.kind == self.inventory.reads), None)

    @property
    def final_numbers(self) -> int:
        """The largest number of parameters, in the model's type, that the selected matrices may have at the end."""
        return int(self.target.kept * self.plan.selected)

    @cached_property
    def inputs(self) -> dict[str, str]:
        """Digests of the data and the model that the request names, by setting."""
        files = {f"data.{task.name}": task.data.identity(self.cache) for task in self.tasks}
        if self.calibration is not None:
            files["calibration"] = self.calibration.identity(self.cache)
        if self.retraining.data is not None:
            files["retrain"] = self.retraining.data.identity(self.cache)
        return files | {"model": self.model.identity(self.cache)}

    def check_inputs(self) -> None:
        """Raise UserError if weights, data, the cache or enough GPUs are missing, or if what is measured is also learnt from.

        Missing weights and data are all named.
        """
        processes, there = self.retraining.processes, torch.cuda.device_count()
        if self.retraining.steps and self.device.startswith("cuda") and processes > there:
            raise UserError(f"retrain.processes={processes} need a GPU each; torch sees {there}; allowed here: 1 to {there}")
        if self.retraining.steps and processes > 1 and ":" in self.device:
            raise UserError(
                f"device={self.device} names one GPU, but retrain.processes={processes} need as many; use device=cuda, which "
                "takes the first ones (CUDA_VISIBLE_DEVICES chooses them)"
            )
        self.cache.check()
        sets = [*(task.data for task in self.tasks), self.calibration, self.retraining.data]
        checks: list[Callable[[], None]] = [partial(self.model.check, self.values["dtype"], self.cache)]
        checks += [data.check for data in sets if data]
        refusals = []
        for check in checks:
            try:
                check()
            except UserError as error:
                refusals.append(str(error))
        if refusals:
            raise UserError("\n".join(dict.fromkeys(refusals)))
        for task in self.tasks:
            for learnt in filter(None, (self.calibration, self.retraining.data, self.model.training)):
                require_apart(task.data, learnt)


def resolve(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with every `auto` replaced by its value on this machine.

    Raises:
        UserError: this machine does not have the device.
    """
    values = settings | {"device": find_device(settings["device"])}
    for group in (values["method"].get("solver", {}), values["refine"], values["retrain"]):
        if group.get("products") == "auto":
            group["products"] = "bfloat16" if has_fast_bfloat16(values["device"]) else "float32"
    return {key: value for key, value in values.items() if key not in INGREDIENTS}


def prepare(settings: dict[str, Any]) -> PreparedRun:
    """Build a request's objects, and check all that can be checked without weights and data.

    Raises:
        UserError: a setting is wrong. The message names it, the allowed values and a remedy.
    """
    values = resolve(settings)
    cache = Cache(Path(values["cache_dir"]))
    method: Method = build("method", values["method"])
    budget: Budget = build("budget", values["budget"])
    tasks: list[Task] = [build(f"task {n}", task) for n, task in values["task"].items() if isinstance(task, dict)]
    model: ModelSource = build("model", values["model"])
    inventory = model.inventory(cache)
    chosen = select_linears(inventory.linears, values["select"]["include"], values["select"]["exclude"])
    refinement: Refinement | None = build("refine", values["refine"]) if values["refine"] else None
    learns = reads_calibration(method, budget) or refinement is not None
    used = {"statistics": learns, "retrain": bool(values["retrain"].get("steps"))}
    values, sets = learnt_from(values, used, inventory.reads)
    used |= {"prompt": inventory.reads == "text", "refine": refinement is not None}
    retraining: Retraining = build("retrain", values["retrain"] | {"data": sets["retrain"]})
    budget.check_retraining(retraining.steps, retraining.train)
    target = target_of(values)
    shares = without_linear_term(budget.allocate(chosen, target), chosen, retraining.linear_term, target.width)
    plan = make_plan(chosen, target, shares, method, DTYPES[values["dtype"]])
    check_sharing(method)
    check_masks(method, budget, plan, target.width)
    for task in tasks:
        task.check(inventory)
    if used["statistics"]:
        check_samples(values, inventory)
    check_gradients(method, budget, values["dtype"])
    check_refinement(refinement, inventory, method, plan, values)
    check_retraining(retraining, inventory, plan, values)
    return PreparedRun(
        settings=settings,
        values={key: value for key, value in values.items() if used.get(key, True)},
        model=model,
        inventory=inventory,
        method=method,
        budget=budget,
        target=target,
        plan=plan,
        tasks=tasks,
        calibration=sets["statistics"],
        refinement=refinement,
        retraining=retraining,
        tracker=build("track", values["track"]),
        cache=cache,
    )


def learnt_from(values: dict[str, Any], used: dict[str, bool], kind: str) -> tuple[dict[str, Any], dict[str, Data | None]]:
    """Reduce the data of calibration and retraining to the one data set that the model can read.

    Args:
        used: whether the run uses the groups `statistics` and `retrain`.
        kind: the input of the model, `text` or `images`.

    Returns:
        the values, in which `data` of each used group is that set's configuration, and the set of each group (or None).

    Raises:
        UserError: no set of this kind was chosen, or a set was named where its settings belong.
    """
    sets: dict[str, Data | None] = dict.fromkeys(used)
    for group in (group for group, needed in used.items() if needed):
        node = values[group]["data"]
        if not isinstance(node, dict):
            raise UserError(f"{group}.data={node} is no data set; choose one by calibration=, for statistics and retraining")
        sets[group] = training_set("calibration", build("calibration", node), kind)
        values = values | {group: values[group] | {"data": node[kind]}}
    return values, sets


def reads_calibration(method: Method, budget: Budget) -> bool:
    """Whether the method or the budget needs calibration samples."""
    return bool(method.needs or budget.needs or budget.samples)


def target_of(values: dict[str, Any]) -> Target:
    """The target of the budget in bits per weight, from `ratio` or `bits`.

    Raises:
        UserError: `bits` is not below the width of the model's type.
    """
    width = 8 * DTYPES[values["dtype"]].itemsize
    if values["bits"] is None:
        return Target((1 - values["ratio"]) * width, width, f"ratio={values['ratio']}")
    if values["bits"] >= width:
        raise UserError(f"bits={values['bits']} compress nothing: a weight in {values['dtype']} has {width}; use fewer")
    return Target(values["bits"], width, f"bits={values['bits']}")


def build(group: str, node: dict[str, Any]) -> Any:
    """The object that a group's configuration describes: an instance of its `_target_`."""
    try:
        return instantiate(node, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise UserError(f"{group} cannot be built: {error}") from error
