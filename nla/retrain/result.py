"""The retraining of a run: from the cache, in this process, or by several; and what its record says."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from nla.config import Request
from nla.crew import Crew
from nla.models.base import LanguageModel, Model
from nla.record import KeptRecord, RetrainRecord
from nla.retrain.cost import MOMENTS
from nla.retrain.history import Row
from nla.retrain.launch import retrain_together
from nla.retrain.parts import prepare_terms, save_terms
from nla.retrain.stage import Retrained, load_retrained, retrain

ROWS = 100  # of the history that a record keeps; the file steps.jsonl has all


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
