"""From live objects to the record of a run: plan, fits, counts, figures."""

from nla.budget.base import PlanEntry
from nla.compressed.layer import CompressedLinear
from nla.harness.record import FitRecord, Parameters, PlanRecord, TermRecord
from nla.harness.request import PreparedRun
from nla.methods.base import Fit
from nla.models.base import DTYPES, Model


def plan_record(plan: list[PlanEntry]) -> list[PlanRecord]:
    return [PlanRecord(name=e.spec.name, n_params=e.n_params, h=e.h, r=e.r) for e in plan]


def fit_record(name: str, fit: Fit) -> FitRecord:
    figures = {k: getattr(fit, k) for k in FitRecord.model_fields if k not in ("name", "shape", "terms")}
    first = fit.terms[0][1]
    terms = [TermRecord(kernel=kernel.name, h=t.h, r=t.r) for kernel, t in fit.terms]
    return FitRecord(name=name, shape=(first.out_features, first.in_features), terms=terms, **figures)


def kept_parameters(model: Model) -> dict[str, int]:
    """Parameters of the triplets of each compressed matrix."""
    return {name: m.count() for name, m in model.module.named_modules() if isinstance(m, CompressedLinear)}


def parameters(prepared: PreparedRun, before: int, after: int, matrices: dict[str, int]) -> Parameters:
    """Counts before and after; what is not selected, biases included, is the same in both."""
    selected, kept = sum(e.spec.n_params for e in prepared.plan), sum(matrices.values())
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
