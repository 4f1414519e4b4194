"""Budgets that are known only with the model at hand: each matrix is compressed alone, and the model's loss measured."""

from contextlib import closing
from dataclasses import replace

import torch
from torch import nn
from tqdm import tqdm

from nla.budget.base import PlanEntry, make_plan
from nla.cache import digest
from nla.config import Request, without_linear_term
from nla.fitting import fit_matrices
from nla.models.base import Model, Sample
from nla.record import code_digest
from nla.statistics import StatisticsStore
from nla.surgery import swap
from nla.workers import ordered_map


def allocated(request: Request, model: Model, samples: list[Sample], store: StatisticsStore) -> Request:
    """The request with the plan that its budget finds; each loss is kept as soon as it is measured."""
    if not request.budget.searches:
        return request
    specs, kernel = [entry.spec for entry in request.plan], request.method.kernel
    values, ratio = request.values, request.values["ratio"]
    chosen = samples[: request.values["budget"]["samples"]]
    made_from = [store.made_from, values["method"], values["seed"], len(chosen), code_digest("nla")]
    known = request.cache.journal("sensitivities", digest(made_from))
    losses = {(part["matrix"], part["n_params"]): part["loss"] for part in known.read().values()}
    by_name = {spec.name: spec for spec in specs}

    def measure(name: str, n_params: int) -> float:
        if (name, n_params) not in losses:
            size = kernel.size(by_name[name].out_features, by_name[name].in_features, n_params)
            entry = PlanEntry(by_name[name], n_params, *size, kernel)
            loss = loss_with(request, model, entry, chosen, store) if entry.h else float("inf")
            known.append(len(losses), {"matrix": name, "n_params": n_params, "loss": loss})
            losses[name, n_params] = loss
        bar.update()
        return losses[name, n_params]

    with tqdm(desc="sensitivity", unit="fit", dynamic_ncols=True) as bar:
        shares = request.budget.search(specs, ratio, measure)
    shares = without_linear_term(shares, specs, request.retraining.linear_term)
    return replace(request, plan=make_plan(specs, ratio, shares, kernel))


def loss_with(request: Request, model: Model, entry: PlanEntry, samples: list[Sample], store: StatisticsStore) -> float:
    """Mean loss over the samples while one matrix is compressed."""
    name, device = entry.spec.name, torch.device(request.device)
    dense = model.module.get_submodule(name)
    assert isinstance(dense, nn.Linear)
    with tqdm(disable=True) as silent:
        settings, seed = request.values["method"], request.values["seed"]
        swap(model.module, dict(fit_matrices(model.module, [entry], request.method, settings, seed, store, silent)))
    try:
        with torch.no_grad(), closing(ordered_map(lambda s: loss_of(model, s.to(device)), samples, device)) as losses:
            return sum(losses) / len(samples)
    finally:
        model.module.set_submodule(name, dense)


@torch.no_grad()
def loss_of(model: Model, sample: Sample) -> float:
    return float(model.loss(sample))
