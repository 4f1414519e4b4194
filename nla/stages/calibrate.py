"""Samples for calibration, and the statistics of the layers' inputs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nla.harness.request import PreparedRun
from nla.machine.cache import digest, tensor_digest
from nla.machine.peak_memory import PeakMemory
from nla.machine.provenance import code_digest, target_modules
from nla.models.base import Model, Sample
from nla.statistics.collect import collect
from nla.statistics.store import StatisticsStore


@dataclass(frozen=True)
class Calibration:
    """Calibration samples, and what the statistics made from them depend on."""

    samples: Sequence[Sample]
    made_from: list[Any]


def sample(prepared: PreparedRun, model: Model, state: str) -> Calibration:
    """The calibration samples; none if nothing reads them. `state` is the digest of the model as it is."""
    if not prepared.calibrates:
        return Calibration([], [])
    asked = prepared.values["statistics"]
    samples = prepared.calibration.samples(model, asked["windows"], asked["length"], asked["seed"])
    digests = [[tensor_digest(t) for t in s] for s in samples]
    code = code_digest("nla.statistics.collect")
    return Calibration(samples, [state, digests, asked["fisher_windows"], code])


def dense_statistics(prepared: PreparedRun, calibration: Calibration) -> StatisticsStore:
    """Where the statistics of the dense model's inputs are."""
    return StatisticsStore(prepared.cache, digest(calibration.made_from))


def sequential_statistics(prepared: PreparedRun, calibration: Calibration) -> StatisticsStore:
    """Where statistics of inputs behind compressed blocks are: what a block reads depends on the fits before it."""
    budgets = [[matrix.spec.name, matrix.bits] for matrix in prepared.plan.matrices]
    settings, seed = prepared.values["method"], prepared.values["seed"]
    fits = [budgets, settings, seed, code_digest(*target_modules(settings))]
    return StatisticsStore(prepared.cache, digest([calibration.made_from, fits]))


def measure_inputs(prepared: PreparedRun, model: Model, calibration: Calibration) -> int:
    """Collect what the method and the budget need of the dense model's inputs. Returns the peak bytes."""
    asked, store = prepared.values["statistics"], dense_statistics(prepared, calibration)
    kinds = prepared.dense_needs.union(asked["collect"])
    with prepared.cache.lock("statistics", store.made_from), PeakMemory(torch.device(prepared.device)) as memory:
        layers, samples = prepared.plan.layers, calibration.samples
        collect(model, layers, kinds, samples, asked["fisher_windows"], store, asked["offload"])
    return memory.peak_bytes
