"""Checks of whether the parts of a request go together. Each raises a UserError that names the setting and a remedy."""

from typing import Any

from nla.budget.base import Budget
from nla.budget.plan import Plan
from nla.machine.errors import UserError
from nla.methods.base import Method
from nla.models.base import Inventory
from nla.refine.settings import Refinement
from nla.retrain.settings import Retraining


def check_samples(values: dict[str, Any], inventory: Inventory) -> None:
    """Raise UserError if the samples of the statistics are longer than the model can read."""
    length = values["statistics"]["length"]
    if inventory.reads == "text" and length > inventory.limit:
        raise UserError(f"statistics.length={length} is longer than the {inventory.limit} tokens the model can read")


def check_refinement(refinement: Refinement | None, method: Method, dtype: str) -> None:
    """Raise UserError if blocks compressed by this method cannot be refined."""
    if refinement is None:
        return
    if method.shares_factors:
        raise UserError("refine=block trains one block at a time, but this method's blocks share factors; use refine=none")
    if dtype == "float16":
        raise UserError("dtype=float16 cannot be refined: small gradients vanish in it; use dtype=bfloat16 or float32")


def check_retraining(retraining: Retraining, inventory: Inventory, plan: Plan, values: dict[str, Any]) -> None:
    """Raise UserError if the model cannot be retrained with these settings."""
    if not retraining.steps:
        return
    if inventory.reads == "text" and retraining.length > inventory.limit:
        raise UserError(f"retrain.length={retraining.length} is longer than the {inventory.limit} tokens the model can read")
    count = len(plan.matrices)
    if retraining.processes > count:
        raise UserError(f"retrain.processes={retraining.processes} have {count} matrices to share; allowed: 1 to {count}")
    if values["dtype"] == "float16":
        raise UserError("dtype=float16 cannot be retrained: small gradients vanish in it; use dtype=bfloat16 or float32")
    device_map = values["model"].get("device_map")
    if retraining.processes > 1 and device_map:
        raise UserError(
            f"model.device_map={device_map} spreads the model over the GPUs that "
            f"retrain.processes={retraining.processes} would each have for themselves; use one of the two"
        )


def check_sharing(method: Method, budget: Budget) -> None:
    """Raise UserError if the budget would mask triplets whose factors other matrices share."""
    if method.shares_factors and budget.tightens:
        raise UserError("budget=adaptive masks single triplets, which this method shares between matrices; use budget=uniform")
