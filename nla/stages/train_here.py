"""Retrain in this process: call `nla.retrain.stages.train_in_stages` with the settings of a run."""

from collections.abc import Callable

from nla.budget.adaptive import Adaptive
from nla.harness.request import PreparedRun
from nla.models.base import Model
from nla.retrain.history import Row
from nla.retrain.stages import train_in_stages, watched_loss
from nla.training.processes import OneProcess


def train_here(prepared: PreparedRun, model: Model, key: str, show: Callable[[Row], None], processes: OneProcess) -> None:
    """Train the model, whose terms must be prepared, and store the result in the cache under `key`."""
    settings, values = prepared.retraining, prepared.values
    watch = None
    if prepared.watched is not None and processes.rank == 0:
        watch = watched_loss(model, prepared.watched.data, settings.watch, settings.length, values["seed"])
    train_in_stages(
        model,
        prepared.plan.layers,
        settings,
        load_dense=lambda: prepared.model.load(prepared.device, values["dtype"], prepared.cache),
        watch=watch,
        budget=prepared.budget if isinstance(prepared.budget, Adaptive) else None,
        final=prepared.final_numbers,
        seed=values["seed"],
        cache=prepared.cache,
        key=key,
        show=show,
        processes=processes,
    )
