"""Fit all planned matrices, put the fitted terms into the model, and refine its blocks if the run asks for it."""

import json
from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from nla.compressed.surgery import swap
from nla.harness.record import RunRecord, write_line
from nla.harness.recording import fit_record, refine_record
from nla.harness.request import PreparedRun
from nla.machine.files import write_atomically
from nla.models.base import Model
from nla.refine.block import Refined
from nla.stages.calibrate import Calibration, dense_statistics
from nla.stages.fit_blocks import fit_block_by_block
from nla.stages.fit_groups import NamedFits, fit_groups


def fit(prepared: PreparedRun, record: RunRecord, model: Model, calibration: Calibration, folder: Path) -> None:
    """Fit all planned matrices and put the terms into the model. Losses of each fit are written and tracked at once."""
    lines, refined = folder / "losses.jsonl", list[Refined]()
    write_atomically(lines, b"")
    with progress(prepared) as bar:
        try:
            for fits in fits_of(prepared, model, calibration, bar, refined):
                for name, result in fits.items():
                    entry = fit_record(name, result)
                    record.fits.append(entry)
                    write_line(lines, {"name": name, "losses": result.losses})
                    prepared.tracker.fit(entry, result.losses)
        finally:
            order = prepared.plan.layers
            record.fits.sort(key=lambda entry: order.index(entry.name))
            prepared.tracker.fitted(record)
    record.peak_bytes["fit"] = max(f.peak_bytes for f in record.fits)
    if refined:
        record.refinement = refine_record(refined)
        record.peak_bytes["refine"] = max(block.peak_bytes for block in refined)
        write_atomically(folder / "refine.jsonl", "".join(f"{json.dumps(vars(block))}\n" for block in refined).encode())


def fits_of(
    prepared: PreparedRun, model: Model, calibration: Calibration, bar: tqdm, refined: list[Refined]
) -> Iterator[NamedFits]:
    """The fits of all groups. The terms are put into the model: block by block if later blocks depend on earlier ones.

    Args:
        refined: gets the result of each refined block.
    """
    if prepared.method.sequential or prepared.refinement:
        return fit_block_by_block(prepared, model, calibration, bar, refined)
    return fit_at_once(prepared, model, calibration, bar)


def fit_at_once(prepared: PreparedRun, model: Model, calibration: Calibration, bar: tqdm) -> Iterator[NamedFits]:
    """The fits of all groups. Their terms are put into the model at the end."""
    store, found = dense_statistics(prepared, calibration), NamedFits()
    settings, seed, method = prepared.values["method"], prepared.values["seed"], prepared.method
    for fits in fit_groups(model.module, prepared.plan.groups, method, settings, seed, method.needs, store, bar):
        found |= fits
        yield fits
    swap(model.module, {name: result.term for name, result in found.items()})


def progress(prepared: PreparedRun) -> tqdm:
    return tqdm(total=prepared.plan.selected, desc="fit", unit="param", unit_scale=True, dynamic_ncols=True)
