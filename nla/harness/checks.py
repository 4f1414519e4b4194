"""Checks of whether the parts of a request go together. Each raises a UserError that names the setting and a remedy."""

from typing import Any

from nla.budget.base import Budget
from nla.budget.plan import Plan
from nla.machine.errors import UserError
from nla.methods.base import Method
from nla.models.base import Inventory
from nla.refine.settings import Refinement
from nla.retrain.settings import Retraining
from nla.statistics.blocks import batch_size
from nla.terms.triplet_terms import triplet_terms


def check_samples(values: dict[str, Any], inventory: Inventory) -> None:
    """Raise UserError if the samples of the statistics are longer than the model can read."""
    length = values["statistics"]["length"]
    if inventory.reads == "text" and length > inventory.limit:
        raise UserError(f"statistics.length={length} is longer than the {inventory.limit} tokens the model can read")


def check_gradients(method: Method, budget: Budget, dtype: str) -> None:
    """Raise UserError if the statistics need gradients that the type is too narrow for."""
    if "fisher" in method.needs | budget.needs and dtype == "float16":
        raise UserError(
            "dtype=float16 cannot hold the gradients that this method or budget reads: small ones vanish in it; use "
            "dtype=bfloat16 or float32"
        )


def check_refinement(
    refinement: Refinement | None, inventory: Inventory, method: Method, plan: Plan, values: dict[str, Any]
) -> None:
    """Raise UserError if blocks compressed by this method cannot be refined."""
    if refinement is None:
        return
    if method.shares_factors:
        raise UserError("refine=block trains one block at a time, but this method's blocks share factors; use refine=none")
    if values["dtype"] == "float16":
        raise UserError("dtype=float16 cannot be refined: small gradients vanish in it; use dtype=bfloat16 or float32")
    check_parts("refine.train", refinement.parts, plan, inventory)
    if inventory.reads == "text":
        windows, each = values["statistics"]["windows"], batch_size(values["statistics"]["length"])
        require_two_batches(windows, each)


def require_two_batches(samples: int, each: int) -> None:
    """Raise UserError if the samples are one batch, of `each` at most, so that refinement can hold none out."""
    if samples <= each:
        raise UserError(
            f"refine=block holds a batch of samples out, but statistics.windows={samples} samples are one batch; use at least "
            f"{each + 1}"
        )


def check_retraining(retraining: Retraining, inventory: Inventory, plan: Plan, values: dict[str, Any]) -> None:
    """Raise UserError if the model cannot be retrained with these settings."""
    if not retraining.steps:
        return
    if inventory.reads == "text" and retraining.length > inventory.limit:
        raise UserError(f"retrain.length={retraining.length} is longer than the {inventory.limit} tokens the model can read")
    for stage in retraining.train if not retraining.linear_term else []:
        check_parts("retrain.train", stage, plan, inventory)
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


def check_parts(setting: str, parts: list[str], plan: Plan, inventory: Inventory) -> None:
    """Raise UserError if the compressed model has no parameter of these parts."""
    has = {"triplets", "everything", *inventory.parts}
    if any(triplet_terms(matrix.term) for matrix in plan.matrices):
        has |= {"A", "B", "mu"}
    if not has & set(parts):
        term = plan.matrices[0].term.describe()
        raise UserError(f"{setting}={'+'.join(parts)} names no part of the model or of {term}; name triplets instead")


def check_sharing(method: Method) -> None:
    """Raise UserError if a sequential method shares factors between matrices: they may be of several parts of the model."""
    if method.shares_factors and method.sequential:
        raise UserError("method.sequential=true fits one layer after the other, and this method's layers share factors")


def check_masks(method: Method, budget: Budget, plan: Plan, width: int) -> None:
    """Raise UserError if the budget would mask triplets, and they are shared or stored in fewer bits than `width` a number."""
    if not budget.tightens:
        return
    if method.shares_factors:
        raise UserError("budget=adaptive masks single triplets, which this method shares between matrices; use budget=uniform")
    for term in (matrix.term for matrix in plan.matrices):
        if term.bits() != width * term.count():
            raise UserError(f"budget=adaptive masks triplets of {width}-bit numbers, not {term.describe()}; use budget=uniform")
