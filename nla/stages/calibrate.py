"""Samples for calibration, and the statistics of the layers' inputs."""

from typing import Any

import torch

from nla.harness.request import PreparedRun
from nla.machine.cache import digest, tensor_digest
from nla.machine.peak_memory import PeakMemory
from nla.machine.provenance import code_digest, target_modules
from nla.models.base import Model, Sample
from nla.statistics.collect import collect
from nla.statistics.store import StatisticsStore


def sample(prepared: PreparedRun, model: Model, state: str) -> tuple[list[Sample], StatisticsStore]:
    """The calibration samples, and where the statistics made from them are; nothing if none are read."""
    if prepared.calibration is None:
        return [], StatisticsStore(prepared.cache, "")
    asked = prepared.values["statistics"]
    samples = prepared.calibration.samples(model, asked["windows"], asked["length"], asked["seed"])
    made_from: list[Any] = [state, [[tensor_digest(t) for t in s] for s in samples], asked["fisher_windows"]]
    if prepared.method.sequential:  # what a block reads depends on the fits before it
        budgets = [[entry.spec.name, entry.n_params] for entry in prepared.plan]
        made_from += [
            budgets,
            prepared.values["method"],
            prepared.values["seed"],
            code_digest(*target_modules(prepared.values["method"])),
        ]
    code = code_digest("nla.statistics.collect")
    return samples, StatisticsStore(prepared.cache, digest([made_from, code]))


def measure_inputs(prepared: PreparedRun, model: Model, samples: list[Sample], store: StatisticsStore) -> int:
    """Collect what the method needs; the peak bytes."""
    asked = prepared.values["statistics"]
    kinds = prepared.method.needs.union(asked["collect"])
    with prepared.cache.lock("statistics", store.made_from), PeakMemory(torch.device(prepared.device)) as memory:
        collect(model, prepared.layers, kinds, samples, asked["fisher_windows"], store, asked["offload"])
    return memory.peak_bytes
