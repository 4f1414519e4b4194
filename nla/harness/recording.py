"""Entries of a record, made from fits and models: figures of each matrix, parameter counts, bits."""

from nla.compressed.contents import count_bits, matrix_counts
from nla.harness.fits_table import FitRecord
from nla.harness.record import Bits, Parameters, RefineRecord
from nla.harness.request import PreparedRun
from nla.methods.fit import Fit
from nla.models.base import Model
from nla.refine.block import Refined

TAKEN_OVER = set(FitRecord.model_fields) - {"name", "shape", "terms", "fitted", "kept"}


def fit_record(name: str, fit: Fit) -> FitRecord:
    figures = {key: getattr(fit, key) for key in TAKEN_OVER}
    return FitRecord(name=name, shape=(fit.term.out_features, fit.term.in_features), terms=fit.term.describe(), **figures)


def refine_record(refined: list[Refined]) -> RefineRecord:
    """The summary of all refined blocks."""
    return RefineRecord(
        blocks=len(refined),
        error_before=sum(block.before for block in refined) / len(refined),
        error_after=sum(block.after for block in refined) / len(refined),
        steps=sum(block.steps for block in refined),
        trained=sum(block.trained for block in refined),
        seconds=sum(block.seconds for block in refined),
    )


def kept_parameters(model: Model) -> dict[str, int]:
    """Number of parameters stored for each compressed matrix, by name."""
    return {name: numbers for name, (numbers, _) in matrix_counts(model.module).items()}


def parameters(prepared: PreparedRun, before: int, after: int, matrices: dict[str, int]) -> Parameters:
    """Parameter counts before and after. Parameters that are not selected, such as biases, are in both model counts."""
    selected, kept = prepared.plan.selected, sum(matrices.values())
    return Parameters(
        selected_before=selected,
        selected_after=kept,
        model_before=before,
        model_after=after,
        ratio=1 - kept / selected,
        model_ratio=1 - after / before,
    )


def bits(prepared: PreparedRun, before: int, model: Model) -> Bits:
    """The storage of the model at the end. `before` is the number of bits of the dense model."""
    selected = sum(bits for _, bits in matrix_counts(model.module).values())
    return Bits(
        selected_per_weight=selected / prepared.plan.selected,
        model_bytes_before=before // 8,
        model_bytes_after=-(-count_bits(model.module) // 8),
    )
