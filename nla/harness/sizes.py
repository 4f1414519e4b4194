"""Sizes that follow from the plan of a run."""

from nla.harness.request import PreparedRun
from nla.matrix.triplets import triplet_size
from nla.models.base import DTYPES


def kept_in_the_end(prepared: PreparedRun) -> int:
    """Parameters of the selected matrices after the whole run."""
    sizes = [triplet_size(m.spec.out_features, m.spec.in_features, 1) for m in prepared.plan.matrices]
    kept = sum(prepared.plan.kept.values()) + prepared.retraining.linear_term * sum(sizes)
    return min(kept, prepared.final_numbers) if prepared.budget.tightens else kept


def bytes_in_the_end(prepared: PreparedRun) -> float:
    """Bytes of the whole model when the run ends."""
    plan, size = prepared.plan, DTYPES[prepared.values["dtype"]].itemsize
    kept_bits = plan.kept_bits * kept_in_the_end(prepared) / sum(plan.kept.values())
    return (prepared.inventory.parameters - plan.selected) * size + kept_bits / 8
