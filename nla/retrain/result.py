"""The retraining of a run: from the cache, in this process, or by several; and what its record says."""

from collections.abc import Callable
from typing import Any

from nla.config import Request
from nla.crew import Crew
from nla.models.base import LanguageModel, Model
from nla.record import KeptRecord, RetrainRecord
from nla.retrain.history import Row
from nla.retrain.launch import retrain_together
from nla.retrain.parts import prepare_terms, save_terms
from nla.retrain.stage import Retrained, load_retrained, retrain

ROWS = 100  # of the history that a record keeps; the file steps.jsonl has all
MOMENTS = 2 * 4  # bytes of AdamW's two fp32 numbers per parameter; importance has two of its own


def retrained(request: Request, model: Model, key: str, show: Callable[[Row], None]) -> Retrained:
    """The model is the retrained one afterwards, its masked triplets dropped."""
    with request.cache.lock("retrained", key):
        shared = request.retraining.processes > 1
        terms = save_terms(model.module) if shared else {}
        prepare_terms(model.module, request.retraining.linear_term, request.values["seed"])
        result = load_retrained(request, model, key)
        if result is not None:
            for row in result.rows:
                show(row)
            return result
        if shared:
            retrain_together(request, terms, key, show)
        else:
            retrain(request, model, key, show, Crew())
        result = load_retrained(request, model, key)
        assert result is not None
        return result


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
