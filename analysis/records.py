"""Records of runs as data frames."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd

from nla.record import RunRecord, read_record

ROOT = Path(__file__).resolve().parent.parent
PLACES = (ROOT / "analysis" / "records", ROOT / "outputs" / "runs")
LAYER = r"\blayers\.(\d+)\."  # the layer number in a qualified name; what follows is the kind of matrix


def load_records(places: Iterable[Path] = PLACES) -> list[RunRecord]:
    """All finished runs below these folders, each signature once, in order of signature."""
    files = [file for place in places for file in sorted(place.rglob("*.json")) if is_record(file)]
    records = {record.signature: record for record in map(read_record, files) if record.status == "done"}
    return [records[signature] for signature in sorted(records)]


def is_record(file: Path) -> bool:
    return file.name == "record.json" or file.parent.name == "records"


def run_settings(record: RunRecord) -> dict[str, Any]:
    """The settings by which runs are compared. `kernel` is that of the method, with the spline's degree."""
    method = record.config["method"]
    kernels = {term.kernel for fit in record.fits for term in fit.terms}
    return {
        "signature": record.signature,
        "model": record.config["model"]["name"],
        "method": method["_target_"].rpartition(".")[2].lower(),
        "kernel": "+".join(sorted(kernels)),
        "start": method.get("solver", {}).get("start", ""),
        "ratio": record.config["ratio"],
        "matrices": len(record.fits),
        "include": record.config["select"]["include"],
    }


def runs_frame(records: Iterable[RunRecord]) -> pd.DataFrame:
    """One row per run: settings, parameters, mean errors, seconds, and `<stage>.<task>.<data>.<metric>` columns."""
    rows = []
    for record in records:
        fits = fits_frame([record])
        row = run_settings(record)
        row |= record.parameters.model_dump(exclude={"ratio"}) if record.parameters else {}
        row |= {key: fits[key].mean() for key in ("relative_error", "svd_error", "floor")}
        row |= {"fit_seconds": fits["seconds"].sum(), "fit_peak_bytes": fits["peak_bytes"].max(), "device": device(record)}
        for stage, tasks in record.metrics.items():
            for task, sets in tasks.items():
                for data, figures in sets.items():
                    row |= {f"{stage}.{task}.{data}.{metric}": value for metric, value in figures.items()}
        rows.append(row)
    return pd.DataFrame(rows)


def fits_frame(records: Iterable[RunRecord]) -> pd.DataFrame:
    """One row per matrix and run: settings, layer, kind of matrix, and every figure of the fit."""
    rows = [
        run_settings(record) | fit.model_dump(exclude={"terms"}) | {"h": fit.terms[0].h, "r": fit.terms[0].r}
        for record in records
        for fit in record.fits
    ]
    frame = pd.DataFrame(rows)
    if len(frame):
        frame["layer"] = frame["name"].str.extract(LAYER, expand=False).astype("Int64")
        frame["kind"] = frame["name"].str.replace(r"^.*\blayers\.\d+\.", "", regex=True)
    return frame


def device(record: RunRecord) -> str:
    return str(record.environment["device"])
