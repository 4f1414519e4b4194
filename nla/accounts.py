"""From live objects to the record of a run: plan, fits, counts, figures."""

from pathlib import Path

from nla.budget.base import PlanEntry
from nla.config import Request
from nla.layers import CompressedLinear
from nla.methods.base import Fit
from nla.models.base import DTYPES, Model
from nla.record import FitRecord, Parameters, PlanRecord, RunRecord, TermRecord


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


def parameters(request: Request, before: int, after: int, matrices: dict[str, int]) -> Parameters:
    """Counts before and after; what is not selected, biases included, is the same in both."""
    selected, kept = sum(e.spec.n_params for e in request.plan), sum(matrices.values())
    size = DTYPES[request.values["dtype"]].itemsize
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


def draw(record: RunRecord, folder: Path) -> None:
    """The figures that W&B shows too."""
    from analysis import plots
    from analysis.records import fits_frame

    plots.loss_by_layer(fits_frame([record])).savefig(folder / "loss_by_layer.png", dpi=120)
    if record.retraining:
        plots.retraining(record.retraining).savefig(folder / "retraining.png", dpi=120)
        plots.kept_by_matrix(record.retraining).savefig(folder / "kept.png", dpi=120)
