"""Budgets that are known only with the model at hand: each matrix is compressed alone, and the model's loss measured."""

from contextlib import closing
from dataclasses import replace

import torch
from torch import nn
from tqdm import tqdm

from nla.budget.base import PlanEntry, make_plan
from nla.compressed.surgery import swap
from nla.harness.request import PreparedRun, without_linear_term
from nla.machine.cache import digest
from nla.machine.provenance import code_digest, target_modules
from nla.machine.threads import ordered_map
from nla.models.base import Model, Sample
from nla.stages.fit import fit_matrices
from nla.statistics.store import StatisticsStore


def allocated(prepared: PreparedRun, model: Model, samples: list[Sample], store: StatisticsStore) -> PreparedRun:
    """The request with the plan that its budget finds; each loss is kept as soon as it is measured."""
    if not prepared.budget.searches:
        return prepared
    specs, kernel = [entry.spec for entry in prepared.plan], prepared.method.kernel
    values, ratio = prepared.values, prepared.values["ratio"]
    chosen = samples[: prepared.values["budget"]["samples"]]
    made_from = [
        store.made_from,
        values["method"],
        values["seed"],
        len(chosen),
        code_digest(*target_modules([values["method"], values["budget"], values["model"]])),
    ]
    known = prepared.cache.journal("sensitivities", digest(made_from))
    losses = {(part["matrix"], part["n_params"]): part["loss"] for part in known.read().values()}
    by_name = {spec.name: spec for spec in specs}

    def measure(name: str, n_params: int) -> float:
        if (name, n_params) not in losses:
            size = kernel.size(by_name[name].out_features, by_name[name].in_features, n_params)
            entry = PlanEntry(by_name[name], n_params, *size, kernel)
            loss = loss_with(prepared, model, entry, chosen, store) if entry.h else float("inf")
            known.append(len(losses), {"matrix": name, "n_params": n_params, "loss": loss})
            losses[name, n_params] = loss
        bar.update()
        return losses[name, n_params]

    with tqdm(desc="sensitivity", unit="fit", dynamic_ncols=True) as bar:
        shares = prepared.budget.search(specs, ratio, measure)
    shares = without_linear_term(shares, specs, prepared.retraining.linear_term)
    return replace(prepared, plan=make_plan(specs, ratio, shares, kernel))


def loss_with(prepared: PreparedRun, model: Model, entry: PlanEntry, samples: list[Sample], store: StatisticsStore) -> float:
    """Mean loss over the samples while one matrix is compressed."""
    name, device = entry.spec.name, torch.device(prepared.device)
    dense = model.module.get_submodule(name)
    assert isinstance(dense, nn.Linear)
    with tqdm(disable=True) as silent:
        settings, seed = prepared.values["method"], prepared.values["seed"]
        swap(model.module, dict(fit_matrices(model.module, [entry], prepared.method, settings, seed, store, silent)))
    try:
        with torch.no_grad(), closing(ordered_map(lambda s: loss_of(model, s.to(device)), samples, device)) as losses:
            return sum(losses) / len(samples)
    finally:
        model.module.set_submodule(name, dense)


@torch.no_grad()
def loss_of(model: Model, sample: Sample) -> float:
    return float(model.loss(sample))
