"""Records of runs as data frames."""

from collections.abc import Iterable

import pandas as pd

from analysis.operations import operations_to_dense
from analysis.settings import run_settings
from nla.harness.fits_table import parse_terms
from nla.harness.record import RunRecord

ERRORS = ("relative_error", "svd_error", "floor", "weighted_error", "svd_llm_error", "weighted_floor")
LAYER = r".*\.(\d+)\."  # the last number in a qualified name is that of the layer; the kind of matrix follows


def runs_frame(records: Iterable[RunRecord]) -> pd.DataFrame:
    """One row per run: settings, parameters, bits, mean errors, seconds, `operations` (to dense), and columns
    `<stage>.<task>.<data>.<metric>`.

    The standard error of a metric is in the column of its name with `_stderr` (older records do not have it).
    """
    rows = []
    for record in records:
        row = run_settings(record)
        row |= record.parameters.model_dump(exclude={"ratio"}) if record.parameters else {}
        row |= record.bits.model_dump() if record.bits else {}
        row |= {key: pd.Series([getattr(fit, key) for fit in record.fits], dtype=float).mean() for key in ERRORS}
        row |= {"fit_seconds": sum(f.seconds for f in record.fits), "fit_peak_bytes": max(f.peak_bytes for f in record.fits)}
        row |= {"operations": operations_to_dense(record.fits)}
        if record.retraining:
            row |= record.retraining.model_dump(include={"tokens", "samples", "trained"})
            row |= {"retrain_seconds": record.retraining.seconds}
        for stage, tasks in record.metrics.items():
            for task, sets in tasks.items():
                for data, figures in sets.items():
                    row |= {f"{stage}.{task}.{data}.{metric}": value for metric, value in figures.items()}
        rows.append(row)
    return pd.DataFrame(rows)


def fits_frame(records: Iterable[RunRecord]) -> pd.DataFrame:
    """One row per matrix and run: settings of the run, layer, kind of matrix, and every figure of the fit.

    `h` and `r` are those of the first term. `bits` is the size of the matrix; the setting `bits` of the run is `asked_bits`.
    """
    rows = []
    for record in records:
        settings = run_settings(record)
        settings["asked_bits"] = settings.pop("bits")
        for fit in record.fits:
            first = parse_terms(fit.terms)[0]
            rows.append(settings | vars(fit) | {"h": first.h, "r": first.r})
    frame = pd.DataFrame(rows)
    if len(frame):
        frame = frame.astype(dict.fromkeys(ERRORS, float))
        frame["kind"] = frame["name"].str.replace(r"^.*\.\d+\.", "", regex=True)
        within = frame.groupby(["signature", "kind"])
        number = frame["name"].str.extract(LAYER, expand=False).astype("Int64")
        staged = (
            frame.assign(number=number).duplicated(["signature", "kind", "number"]).groupby(frame["signature"]).transform("any")
        )
        frame["layer"] = number.mask(staged, within.cumcount())  # Swin numbers its blocks from 0 in each stage
    return frame
