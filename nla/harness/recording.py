"""From live objects to the record of a run: plan, fits, counts."""

from nla.budget.plan import Plan
from nla.compressed.contents import matrix_counts
from nla.harness.record import FitRecord, Parameters, PlanRecord
from nla.harness.request import PreparedRun
from nla.methods.fit import Fit
from nla.models.base import DTYPES, Model


def plan_record(plan: Plan) -> list[PlanRecord]:
    return [PlanRecord(name=m.spec.name, bits=m.bits, terms=m.term.describe()) for m in plan.matrices]


def fit_record(name: str, fit: Fit) -> FitRecord:
    figures = {k: getattr(fit, k) for k in FitRecord.model_fields if k not in ("name", "shape", "terms")}
    return FitRecord(name=name, shape=(fit.term.out_features, fit.term.in_features), terms=fit.term.describe(), **figures)


def kept_parameters(model: Model) -> dict[str, int]:
    """Numbers that are stored for each compressed matrix."""
    return {name: numbers for name, (numbers, _) in matrix_counts(model.module).items()}


def parameters(prepared: PreparedRun, before: int, after: int, matrices: dict[str, int]) -> Parameters:
    """Counts before and after; what is not selected, biases included, is the same in both."""
    selected, kept = prepared.plan.selected, sum(matrices.values())
    size = DTYPES[prepared.values["dtype"]].itemsize
    return Parameters(
        selected_before=selected,
        selected_after=kept,
        model_before=before,
        model_after=after,
        ratio=1 - kept / selected,
        model_ratio=1 - after / before,
        bytes_before=before * size,
        bytes_after=after * size,
    )
