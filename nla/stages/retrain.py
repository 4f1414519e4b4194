"""Retrain the compressed model in one or several processes, or load the result from the cache; and record it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from nla.compressed.contents import replace_parameters
from nla.harness.estimate_retraining import MOMENTS
from nla.harness.record import RetrainRecord, RunRecord, write_line
from nla.harness.recording import kept_parameters
from nla.harness.request import PreparedRun
from nla.machine.cache import digest
from nla.machine.files import write_atomically
from nla.machine.provenance import code_digest, computing_packages, target_modules
from nla.models.base import LanguageModel, Model
from nla.retrain.dropping import drop_masked
from nla.retrain.history import Row
from nla.retrain.stages import checkpoint_keys
from nla.retrain.trainable import pack_terms, prepare_terms
from nla.stages.train_here import train_here
from nla.stages.train_together import hand_over, train_together
from nla.training.processes import OneProcess


def retrain(prepared: PreparedRun, record: RunRecord, model: Model, folder: Path, key: str) -> None:
    """Retrain the model in place, drop masked triplets, and add the figures to the record."""
    fitted = kept_parameters(model)
    lines = folder / "steps.jsonl"
    write_atomically(lines, b"")

    def show(row: Row) -> None:
        write_line(lines, row)
        prepared.tracker.step(row)

    result = train_or_load(prepared, model, key, show)
    pack_terms(model.module)
    record.peak_bytes["retrain"] = result.peak_bytes
    record.retraining, record.history = retrain_record(prepared, model, result), result.rows
    kept = kept_parameters(model)
    for matrix in record.fits:
        matrix.fitted, matrix.kept = fitted[matrix.name], kept[matrix.name]


@dataclass(frozen=True)
class Retrained:
    """The figures of a finished retraining.

    Attributes:
        rows: its history, see `nla.retrain.history`.
        peak_bytes: peak memory of computing the gradient of one micro-batch.
        trained: number of parameters that the optimiser changed at once.
        scored: number of parameters whose importance was tracked.
    """

    rows: list[Row]
    peak_bytes: int
    trained: int
    scored: int


def key_of(prepared: PreparedRun, compressed: str, dense: str) -> str:
    """Cache key of a retraining: digest of all that its result depends on.

    Args:
        compressed, dense: digests of both models' states.
    """
    names = ("retrain", "budget", "ratio", "bits", "seed")
    task = prepared.watched
    watched = task and [prepared.values["task"][task.name]["data"], prepared.inputs[f"data.{task.name}"]]
    return digest(
        {
            "states": [compressed, dense],
            "settings": {name: prepared.values[name] for name in names},
            "data": [prepared.inputs["retrain"], watched],
            "code": code_digest("nla.retrain.stages", *target_modules([prepared.values["budget"], prepared.values["retrain"]])),
            "packages": computing_packages(),
        }
    )


def load_retrained(prepared: PreparedRun, model: Model, key: str) -> Retrained | None:
    """Load a finished retraining from the cache into the prepared model, or return None if the cache has none."""
    entry = prepared.cache.load_tensors("retrained", key)
    if entry is None:
        return None
    tensors, notes = entry
    replace_parameters(model.module, tensors)  # they may have fewer triplets
    drop_masked(model.module)
    for checkpoint_key in checkpoint_keys(key, len(prepared.retraining.train)):
        prepared.cache.remove("trainings", checkpoint_key)
    return Retrained(**notes)


def train_or_load(prepared: PreparedRun, model: Model, key: str, show: Callable[[Row], None]) -> Retrained:
    """Retrain the model in place, or load the result from the cache. Masked triplets are dropped."""
    together = prepared.retraining.processes > 1
    with prepared.cache.lock("retrained", key):
        handed = hand_over(model.module) if together else None
        prepare_terms(model.module, prepared.retraining.linear_term, prepared.values["seed"])
        try:
            result = load_retrained(prepared, model, key)
            if result is not None:
                for row in result.rows:
                    show(row)
                return result
            if handed is None:
                train_here(prepared, model, key, show, OneProcess())
            else:
                prepared.cache.store_tensors("compressed", key, *handed)
                handed = None  # frees the terms as they were
                with on_the_cpu(model.module, prepared.device):
                    train_together(prepared, key, show, [type(model).__module__, type(model.module).__module__])
            result = load_retrained(prepared, model, key)
            assert result is not None
            return result
        finally:
            prepared.cache.remove("compressed", key)


@contextmanager
def on_the_cpu(module: nn.Module, device: str) -> Iterator[None]:
    """Context in which the model is on the CPU, so that other processes can use the GPU."""
    module.to("cpu")
    torch.cuda.empty_cache()
    yield
    module.to(device)


def retrain_record(prepared: PreparedRun, model: Model, result: Retrained) -> RetrainRecord:
    """The size and cost of a retraining, for the record."""
    settings = prepared.retraining
    samples = settings.steps * settings.batch
    return RetrainRecord(
        steps=settings.steps,
        samples=samples,
        tokens=samples * settings.length if isinstance(model, LanguageModel) else None,
        trained=result.trained,
        optimiser_bytes=result.trained * MOMENTS,
        importance_bytes=result.scored * MOMENTS,
        dense_optimiser_bytes=prepared.inventory.parameters * MOMENTS,
        seconds=sum(row.get("seconds", 0.0) for row in result.rows),
    )
