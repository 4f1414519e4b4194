"""From live objects to the record of a run: fits, counts, bits."""

from nla.compressed.layer import CompressedLinear
from nla.harness.fits_table import FitRecord, terms_text
from nla.harness.record import Bits, Parameters
from nla.harness.request import PreparedRun
from nla.methods.base import Fit
from nla.models.base import DTYPES, Model

TAKEN_OVER = set(FitRecord.model_fields) - {"name", "shape", "terms", "bits", "fitted", "kept"}


def fit_record(name: str, fit: Fit) -> FitRecord:
    figures = {key: getattr(fit, key) for key in TAKEN_OVER}
    first = fit.terms[0][1]
    bits = sum(8 * t.A.element_size() * t.count() for _, t in fit.terms)
    shape = (first.out_features, first.in_features)
    return FitRecord(name=name, shape=shape, terms=terms_text(fit.terms), bits=bits, **figures)


def kept_parameters(model: Model) -> dict[str, int]:
    """Parameters of the triplets of each compressed matrix."""
    return {name: m.count() for name, m in model.module.named_modules() if isinstance(m, CompressedLinear)}


def parameters(prepared: PreparedRun, before: int, after: int, matrices: dict[str, int]) -> Parameters:
    """Counts before and after; what is not selected, biases included, is the same in both."""
    selected, kept = sum(e.spec.n_params for e in prepared.plan), sum(matrices.values())
    return Parameters(
        selected_before=selected,
        selected_after=kept,
        model_before=before,
        model_after=after,
        ratio=1 - kept / selected,
        model_ratio=1 - after / before,
    )


def bits(prepared: PreparedRun, counts: Parameters) -> Bits:
    """What the model of these counts takes in the run's dtype."""
    size = DTYPES[prepared.values["dtype"]].itemsize
    return Bits(
        selected_per_weight=8 * size * counts.selected_after / counts.selected_before,
        model_bytes_before=size * counts.model_before,
        model_bytes_after=size * counts.model_after,
    )
