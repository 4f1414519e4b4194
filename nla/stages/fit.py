"""Fit all planned matrices, and put the fitted terms into the model."""

from collections.abc import Iterator
from pathlib import Path

from tqdm import tqdm

from nla.compressed.surgery import swap
from nla.harness.record import RunRecord, write_line
from nla.harness.recording import fit_record
from nla.harness.request import PreparedRun
from nla.machine.files import write_atomically
from nla.models.base import Model
from nla.stages.calibrate import Calibration, dense_statistics, sequential_statistics
from nla.stages.fit_groups import NamedFits, fit_groups
from nla.statistics.collect import StatisticsStream


def fit(prepared: PreparedRun, record: RunRecord, model: Model, calibration: Calibration, folder: Path) -> None:
    """Fit all planned matrices and put the terms into the model. Losses of each fit are written and tracked at once."""
    fit_all = fit_block_by_block if prepared.method.sequential else fit_at_once
    lines = folder / "losses.jsonl"
    write_atomically(lines, b"")
    with progress(prepared) as bar:
        try:
            for fits in fit_all(prepared, model, calibration, bar):
                for name, result in fits.items():
                    entry = fit_record(name, result)
                    record.fits.append(entry)
                    write_line(lines, {"name": name, "losses": result.losses})
                    prepared.tracker.fit(entry, result.losses)
        finally:
            prepared.tracker.fitted(record)
    record.peak_bytes["fit"] = max(f.peak_bytes for f in record.fits)


def fit_at_once(prepared: PreparedRun, model: Model, calibration: Calibration, bar: tqdm) -> Iterator[NamedFits]:
    """The fits of all groups. Their terms are put into the model at the end."""
    store, found = dense_statistics(prepared, calibration), NamedFits()
    settings, seed = prepared.values["method"], prepared.values["seed"]
    for fits in fit_groups(model.module, prepared.plan.groups, prepared.method, settings, seed, store, bar):
        found |= fits
        yield fits
    swap(model.module, {name: result.term for name, result in found.items()})


def fit_block_by_block(prepared: PreparedRun, model: Model, calibration: Calibration, bar: tqdm) -> Iterator[NamedFits]:
    """The fits of all groups, block by block. Each block is fitted to inputs that passed the compressed earlier blocks."""
    store, method, plan = sequential_statistics(prepared, calibration), prepared.method, prepared.plan
    settings, seed = prepared.values["method"], prepared.values["seed"]
    offload = prepared.values["statistics"]["offload"]
    stream = StatisticsStream(model, plan.layers, method.needs, calibration.samples, store, offload)
    for block in stream.blocks():
        stream.measure(block)
        found = NamedFits()
        for fits in fit_groups(model.module, plan.of_layers(block.layers).groups, method, settings, seed, store, bar):
            found |= fits
            yield fits
        swap(model.module, {name: result.term for name, result in found.items()})
        stream.advance(block, swapped=True)


def progress(prepared: PreparedRun) -> tqdm:
    return tqdm(total=prepared.plan.selected, desc="fit", unit="param", unit_scale=True, dynamic_ncols=True)
