"""Train a compressed model in stages, and keep the result."""

import math
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nla.blocks import chain
from nla.budget.adaptive import Adaptive, Tightening
from nla.cache import digest
from nla.config import Request
from nla.crew import Crew
from nla.layers import Term
from nla.models.base import Model, Sample
from nla.record import code_digest, computing_packages
from nla.retrain.distillation import Distillation
from nla.retrain.history import History, Row, mean_loss
from nla.retrain.parts import chosen_parts, drop_masked
from nla.retrain.surface import surface_of
from nla.trained import Trained, owned_by_module
from nla.training import train
from nla.triplets import Triplets
from tasks.images import Images
from tasks.text import Text

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


def stage_keys(request: Request, key: str) -> list[str]:
    """Under which each stage of a retraining keeps its checkpoints."""
    return [digest([key, stage]) for stage, _ in enumerate(request.retraining.train)]


def load_retrained(request: Request, model: Model, key: str) -> Retrained | None:
    """Put the numbers of a finished retraining into the prepared model and drop its masked triplets; None if there is none."""
    entry = request.cache.load_tensors("retrained", key)
    if entry is None:
        return None
    tensors, notes = entry
    model.module.load_state_dict(tensors, strict=False)
    drop_masked(model.module)
    for stage_key in stage_keys(request, key):
        request.cache.remove("trainings", stage_key)
    return Retrained(**notes)


def retrain(request: Request, model: Model, key: str, show: Callable[[Row], None], crew: Crew) -> None:
    """Train what `retrain.train` names of a prepared model, stage after stage; the result is in the cache under `key`.

    Raises:
        NonFiniteError: names the step, the batch and the last good checkpoint.
    """
    settings, cache = request.retraining, request.cache
    batch, watch = batches(request, model), watched(request, model) if crew.rank == 0 else None
    rows: list[Row] = []
    tensors: dict[str, Tensor] = {}
    peaks, counts, keys = [], [], stage_keys(request, key)
    for stage, parts in enumerate(settings.train):
        before = stage * settings.recipe.steps
        trained = chosen_parts(model.module, parts)
        owned_by_module(trained, crew)

        def shown(row: Row, before: int = before) -> None:
            rows.append(row | {"step": row["step"] + before})
            show(rows[-1])

        def batch_of(step: int, before: int = before) -> list[Sample]:
            return batch(step + before)

        terms = {name: m for name, m in model.module.named_modules() if isinstance(m, Term)}
        own = {t.name: t for t in trained if t.owner == crew.rank}
        masks, kept = tightening(request, terms, trained, crew), sum(term.triplets.count() for term in terms.values())
        history = History(surface_of(terms, own), list(terms), masks, kept, watch, settings.recipe, shown)
        label = f"retrain {'+'.join(parts)}"
        blocks = recomputed_blocks(model, request.layers) if settings.recompute else nullcontext()
        with objective(request, model) as loss, blocks:
            peaks.append(train(trained, loss, batch_of, settings.recipe, cache, keys[stage], label, history, crew))
        counts.append(sum(t.parameter.numel() for t in trained))
        tensors |= {t.name: t.parameter.detach() for t in trained}
    if crew.rank == 0:
        scored = sum(p.numel() for name, p in tensors.items() if name.rpartition(".")[2] in ("A", "B", "mu"))
        notes = {"trained": max(counts), "scored": scored if request.budget.tightens else 0}
        cache.store_tensors("retrained", key, tensors, notes | {"rows": rows, "peak_bytes": max(peaks)})
    crew.wait()


@contextmanager
def objective(request: Request, model: Model) -> Iterator[Callable[[Sample], Tensor]]:
    """The model's own loss, or with a dense model beside it that of `Distillation`."""
    if not request.retraining.distils:
        yield model.loss
        return
    dense = request.model.load(request.device, request.values["dtype"], request.cache)
    dense.module.requires_grad_(False)
    with closing(Distillation(model, dense, request.layers, request.retraining)) as loss:
        yield loss


def batches(request: Request, model: Model) -> Callable[[int], list[Sample]]:
    """step -> its micro-batches, a function of the seed and the step alone."""
    settings = request.retraining

    def batch(step: int) -> list[Sample]:
        seed = int(digest([request.values["seed"], step])[:15], 16)
        samples = request.training_data.samples(model, settings.batch, settings.length, seed)
        parts = [samples[i : i + settings.micro] for i in range(0, settings.batch, settings.micro)]
        return [Sample(torch.cat([s.inputs for s in part]), torch.cat([s.targets for s in part])) for part in parts]

    return batch


def watched(request: Request, model: Model) -> Callable[[], Row] | None:
    """The loss, of text the perplexity too, on a few samples of the first task's data that can be sampled."""
    data = next((task.data for task in request.tasks if isinstance(task.data, Text | Images)), None)
    count = request.retraining.watch
    if data is None or count == 0:
        return None
    samples = data.samples(model, count, request.retraining.length, request.values["seed"])

    def measure() -> Row:
        loss = mean_loss(model, samples)
        return {"watched": loss} | ({"watched_perplexity": math.exp(min(loss, 700))} if isinstance(data, Text) else {})

    return measure


def tightening(request: Request, terms: dict[str, Term], trained: list[Trained], crew: Crew) -> Tightening | None:
    """The masks of the model's terms, where the budget tightens."""
    budget = request.budget
    if not isinstance(budget, Adaptive):
        return None
    by_name = {t.name: t for t in trained}
    owners = [by_name[f"{name}.mu"].owner for name in terms]
    moved = [
        Triplets(*(by_name[f"{name}.{part}"].master for part in ("A", "B", "mu"))) if owner == crew.rank else term.triplets
        for (name, term), owner in zip(terms.items(), owners, strict=True)
    ]
    final = int((1 - request.values["ratio"]) * sum(entry.spec.n_params for entry in request.plan))
    return budget.tightening(moved, final, request.retraining.steps, crew, owners)


@contextmanager
def recomputed_blocks(model: Model, layers: list[str]) -> Iterator[None]:
    """Meanwhile every block keeps its inputs only; what is inside is computed again for the gradient (Chen et al., 2016)."""
    blocks = [block.module for block in chain(model, layers)]
    for block in blocks:
        forward = block.forward

        def again(*arguments: Any, forward: Callable = forward, **keywords: Any) -> Any:
            return checkpoint(forward, *arguments, use_reentrant=False, preserve_rng_state=False, **keywords)

        block.forward = again
    try:
        yield
    finally:
        for block in blocks:
            del block.forward
