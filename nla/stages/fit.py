"""Fit every planned matrix of a model, with what was fitted before taken from the cache."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from nla.budget.base import PlanEntry
from nla.compressed.surgery import get_linear, swap
from nla.harness.record import RunRecord, write_line
from nla.harness.recording import fit_record
from nla.harness.request import PreparedRun
from nla.machine.cache import Cache, digest, tensor_digest
from nla.machine.errors import NonFiniteError
from nla.machine.provenance import code_digest, computing_packages, target_modules
from nla.machine.threads import ordered_map
from nla.matrix.triplets import Triplets
from nla.methods.base import Fit, Method
from nla.models.base import Model, Sample
from nla.statistics.collect import stream_blocks
from nla.statistics.store import StatisticsStore


def fit(
    prepared: PreparedRun, record: RunRecord, model: Model, samples: list[Sample], store: StatisticsStore, folder: Path
) -> None:
    """Fit and swap all planned matrices; the losses of each are on disk and tracked as soon as it is fitted."""
    with (folder / "losses.jsonl").open("w") as lines, progress(prepared) as bar:
        for part in parts(prepared, model, samples, store):
            fits: dict[str, Fit] = {}
            settings, seed = prepared.values["method"], prepared.values["seed"]
            for name, result in fit_matrices(model.module, part, prepared.method, settings, seed, store, bar):
                fits[name] = result
                entry = fit_record(name, result)
                record.fits.append(entry)
                write_line(lines, {"name": name, "losses": result.losses})
                prepared.tracker.fit(entry, result.losses)
            swap(model.module, fits)
    record.peak_bytes["fit"] = max(f.peak_bytes for f in record.fits)


def parts(prepared: PreparedRun, model: Model, samples: list[Sample], store: StatisticsStore) -> Iterator[list[PlanEntry]]:
    """What is fitted before it is swapped in: everything, or one block after the other."""
    if not prepared.method.sequential:
        yield prepared.plan
        return
    offload = prepared.values["statistics"]["offload"]
    for block in stream_blocks(model, prepared.layers, prepared.method.needs, samples, store, offload):
        yield [entry for entry in prepared.plan if entry.spec.name in block.layers]


def progress(prepared: PreparedRun) -> tqdm:
    total = sum(e.spec.n_params for e in prepared.plan)
    return tqdm(total=total, desc="fit", unit="param", unit_scale=True, dynamic_ncols=True)


FORMAT = 2
SCALARS = [field.name for field in fields(Fit) if field.name != "terms"]
NamedFit = tuple[str, Fit]


def fit_matrices(
    model: nn.Module,
    plan: list[PlanEntry],
    method: Method,
    settings: dict[str, Any],
    seed: int,
    store: StatisticsStore,
    bar: tqdm,
) -> Iterator[NamedFit]:
    """(name, fit) of every planned matrix, in the order of the plan.

    A result depends on its weight, statistics, budget, settings and seed alone: each matrix has its own generator and one
    thread.

    Raises:
        NonFiniteError: names the matrix; the fits before it stay in the cache.
    """
    device = next(model.parameters()).device

    def fit_one(entry: PlanEntry) -> NamedFit:
        name, weight = entry.spec.name, get_linear(model, entry.spec.name).weight.detach()
        key = digest(
            {
                "format": FORMAT,
                "code": code_digest(*target_modules(settings)),
                "weight": tensor_digest(weight),
                "statistics": [store.key(kind, name) for kind in sorted(method.needs)],
                "n_params": entry.n_params,
                "method": settings,
                "seed": seed,
                "device": device.type,
                "packages": computing_packages(),
            }
        )
        fit = load_fit(store.cache, key, method)
        if fit is None:
            statistics = store.load(method.needs, name, device)
            try:
                fit = method.compress(weight, entry.n_params, statistics, torch.Generator().manual_seed(seed))
            except NonFiniteError as error:
                raise NonFiniteError(f"{name}: {error}") from error
            store_fit(store.cache, key, fit)
        return name, fit

    with closing(ordered_map(fit_one, plan, device)) as results:
        for entry, (name, fit) in zip(plan, results, strict=True):
            bar.set_postfix_str(f"{name.rpartition('layers.')[2]} {fit.relative_error:.3f}", refresh=False)
            bar.update(entry.spec.n_params)
            yield name, fit


def load_fit(cache: Cache, key: str, method: Method) -> Fit | None:
    entry = cache.load_tensors("fits", key)
    if entry is None:
        return None
    tensors, info = entry
    triplets = Triplets(tensors["A"], tensors["B"], tensors["mu"])
    info["losses"] = [(step, loss) for step, loss in info["losses"]]
    return Fit(terms=((method.kernel, triplets),), **info)


def store_fit(cache: Cache, key: str, fit: Fit) -> None:
    ((_, t),) = fit.terms
    info = {name: getattr(fit, name) for name in SCALARS}
    cache.store_tensors("fits", key, {"A": t.A, "B": t.B, "mu": t.mu}, info)
