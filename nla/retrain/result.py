"""The retraining of a run: from the cache, in this process, or by several; and what its record says."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from nla.cache import digest
from nla.config import Request
from nla.crew import Crew
from nla.models.base import LanguageModel, Model
from nla.record import KeptRecord, RetrainRecord, code_digest, computing_packages
from nla.retrain.cost import MOMENTS
from nla.retrain.dropping import drop_masked, load_retrained_terms
from nla.retrain.history import Row
from nla.retrain.launch import retrain_together
from nla.retrain.parts import prepare_terms, save_terms
from nla.retrain.stage import retrain, stage_keys

ROWS = 100  # of the history that a record keeps; the file steps.jsonl has all
CODE = (
    "nla/retrain",
    "nla/budget",
    "nla/training.py",
    "nla/trained.py",
    "nla/resume.py",
    "nla/crew.py",
    "nla/blocks.py",
    "nla/workers.py",
)


@dataclass(frozen=True)
class Retrained:
    """What a retraining leaves beside the weights.

    Attributes:
        rows: as in `nla.retrain.history`.
        peak_bytes: of one micro-batch's gradient.
        trained: parameters that the optimiser moved at once; scored: those whose importance was followed.
    """

    rows: list[Row]
    peak_bytes: int
    trained: int
    scored: int


def key_of(request: Request, compressed: str, dense: str) -> str:
    """Digest of everything the result depends on, given the digests of both models' states."""
    names = ("retrain", "budget", "ratio", "seed", "task")
    return digest(
        {
            "states": [compressed, dense],
            "settings": {name: request.values[name] for name in names},
            "inputs": request.inputs,
            "code": code_digest(*CODE),
            "packages": computing_packages(),
        }
    )


def load_retrained(request: Request, model: Model, key: str) -> Retrained | None:
    """Put the numbers of a finished retraining into the prepared model and drop its masked triplets; None if there is none."""
    entry = request.cache.load_tensors("retrained", key)
    if entry is None:
        return None
    tensors, notes = entry
    load_retrained_terms(model.module, tensors)
    drop_masked(model.module)
    for stage_key in stage_keys(request, key):
        request.cache.remove("trainings", stage_key)
    return Retrained(**notes)


def retrained(request: Request, model: Model, key: str, show: Callable[[Row], None]) -> Retrained:
    """The model is the retrained one afterwards, its masked triplets dropped."""
    together = request.retraining.processes > 1
    with request.cache.lock("retrained", key):
        if together:
            request.cache.store_tensors("compressed", key, save_terms(model.module), {})
        prepare_terms(model.module, request.retraining.linear_term, request.values["seed"])
        try:
            result = load_retrained(request, model, key)
            if result is not None:
                for row in result.rows:
                    show(row)
                return result
            if together:
                with on_the_cpu(model.module, request.device):
                    retrain_together(request, key, show)
            else:
                retrain(request, model, key, show, Crew())
            result = load_retrained(request, model, key)
            assert result is not None
            return result
        finally:
            request.cache.remove("compressed", key)


@contextmanager
def on_the_cpu(module: nn.Module, device: str) -> Iterator[None]:
    """Meanwhile the model leaves a GPU to others."""
    module.to("cpu")
    torch.cuda.empty_cache()
    yield
    module.to(device)


def retrain_record(
    request: Request, model: Model, result: Retrained, fitted: dict[str, int], kept: dict[str, int]
) -> RetrainRecord:
    """Counts, bytes, and the rows that fit a record; `fitted` and `kept` are parameters by matrix, before and after."""
    settings = request.retraining
    samples = settings.steps * settings.batch
    sizes = {entry.spec.name: entry.spec.n_params for entry in request.plan}
    return RetrainRecord(
        steps=settings.steps,
        samples=samples,
        tokens=samples * settings.length if isinstance(model, LanguageModel) else None,
        trained=result.trained,
        optimiser_bytes=result.trained * MOMENTS,
        importance_bytes=result.scored * MOMENTS,
        dense_optimiser_bytes=request.inventory.parameters * MOMENTS,
        seconds=sum(row.get("seconds", 0.0) for row in result.rows),
        history=thinned(result.rows),
        matrices=[KeptRecord(name=n, fitted=fitted[n], kept=kept[n], ratio=1 - kept[n] / size) for n, size in sizes.items()],
    )


def thinned(rows: list[Row]) -> list[dict[str, Any]]:
    """About ROWS rows, evenly spaced, with the last and all that were watched, without matrices."""
    every = max(1, len(rows) // ROWS)
    chosen = [row for i, row in enumerate(rows) if i % every == 0 or "watched" in row or i == len(rows) - 1]
    return [{name: value for name, value in row.items() if name != "matrices"} for row in chosen]
