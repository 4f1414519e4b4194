"""Draw calibration samples, and collect the statistics of the layers' inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nla.harness.request import PreparedRun
from nla.machine.cache import digest, tensor_digest
from nla.machine.peak_memory import PeakMemory
from nla.machine.provenance import code_digest, computing_packages, target_modules
from nla.models.base import Model, Sample
from nla.statistics.collect import collect
from nla.statistics.store import StatisticsStore


@dataclass(frozen=True)
class Calibration:
    """Calibration samples. `made_from` are JSON values that identify all that their statistics depend on."""

    samples: Sequence[Sample]
    made_from: list[Any]


def sample(prepared: PreparedRun, model: Model, state: str) -> Calibration:
    """The calibration samples, or no samples if the run needs none. `state` is the digest of the current model."""
    if prepared.calibration is None:
        return Calibration([], [])
    asked = prepared.values["statistics"]
    samples = prepared.calibration.samples(model, asked["windows"], asked["length"], asked["seed"])
    digests = [[tensor_digest(t) for t in s] for s in samples]
    code = code_digest("nla.statistics.collect")
    return Calibration(samples, [state, digests, asked["fisher_windows"], code])


def dense_statistics(prepared: PreparedRun, calibration: Calibration) -> StatisticsStore:
    """The store of the statistics of the dense model's inputs."""
    return StatisticsStore(prepared.cache, digest(calibration.made_from))


def sequential_statistics(prepared: PreparedRun, calibration: Calibration) -> StatisticsStore:
    """The store of statistics of inputs behind compressed blocks."""
    return StatisticsStore(prepared.cache, digest(compressed_blocks(prepared, calibration)))


def compressed_blocks(prepared: PreparedRun, calibration: Calibration) -> list[Any]:
    """JSON values that identify all that the compressed (and refined) blocks depend on."""
    budgets = [[matrix.spec.name, matrix.bits] for matrix in prepared.plan.matrices]
    method, refine, seed = prepared.values["method"], prepared.values.get("refine"), prepared.values["seed"]
    code = code_digest("nla.stages.fit_blocks", *target_modules(method), *(["nla.refine.block"] if refine else []))
    return [calibration.made_from, budgets, method, refine, seed, prepared.device.partition(":")[0], computing_packages(), code]


def measure_inputs(prepared: PreparedRun, model: Model, calibration: Calibration) -> int:
    """Collect the statistics of the dense model's inputs that method and budget need. Returns the peak memory in bytes."""
    asked, store = prepared.values["statistics"], dense_statistics(prepared, calibration)
    kinds = prepared.dense_needs.union(asked["collect"])
    with prepared.cache.lock("statistics", store.made_from), PeakMemory(torch.device(prepared.device)) as memory:
        layers, samples = prepared.plan.layers, calibration.samples
        collect(model, layers, kinds, samples, asked["fisher_windows"], store, asked["offload"])
    return memory.peak_bytes
