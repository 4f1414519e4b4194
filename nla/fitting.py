"""Fit every planned matrix of a model, with what was fitted before taken from the cache."""

from collections.abc import Iterator
from contextlib import closing
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from nla.budget.base import PlanEntry
from nla.cache import Cache, digest, tensor_digest
from nla.errors import NonFiniteError
from nla.methods.base import Fit, Method
from nla.record import code_digest, computing_packages
from nla.statistics import StatisticsStore
from nla.surgery import get_linear
from nla.triplets import Triplets
from nla.workers import ordered_map

FORMAT = 2
CODE = (
    "nla/kernels",
    "nla/methods",
    "nla/solvers",
    "nla/linalg.py",
    "nla/memory.py",
    "nla/objective.py",
    "nla/triplets.py",
)
SCALARS = [field.name for field in fields(Fit) if field.name != "terms"]
NamedFit = tuple[str, Fit]


def fit_matrices(
    model: nn.Module,
    plan: list[PlanEntry],
    method: Method,
    settings: dict[str, Any],
    seed: int,
    store: StatisticsStore,
    bar: tqdm,
) -> Iterator[NamedFit]:
    """(name, fit) of every planned matrix, in the order of the plan.

    A result depends on its weight, statistics, budget, settings and seed alone: each matrix has its own generator and one
    thread.

    Raises:
        NonFiniteError: names the matrix; the fits before it stay in the cache.
    """
    device = next(model.parameters()).device

    def fit_one(entry: PlanEntry) -> NamedFit:
        name, weight = entry.spec.name, get_linear(model, entry.spec.name).weight.detach()
        key = digest(
            {
                "format": FORMAT,
                "code": code_digest(*CODE),
                "weight": tensor_digest(weight),
                "statistics": [store.key(kind, name) for kind in sorted(method.needs)],
                "n_params": entry.n_params,
                "method": settings,
                "seed": seed,
                "device": device.type,
                "packages": computing_packages(),
            }
        )
        fit = load_fit(store.cache, key, method)
        if fit is None:
            statistics = store.load(method.needs, name, device)
            try:
                fit = method.compress(weight, entry.n_params, statistics, torch.Generator().manual_seed(seed))
            except NonFiniteError as error:
                raise NonFiniteError(f"{name}: {error}") from error
            store_fit(store.cache, key, fit)
        return name, fit

    with closing(ordered_map(fit_one, plan, device)) as results:
        for entry, (name, fit) in zip(plan, results, strict=True):
            bar.set_postfix_str(f"{name.rpartition('layers.')[2]} {fit.relative_error:.3f}", refresh=False)
            bar.update(entry.spec.n_params)
            yield name, fit


def load_fit(cache: Cache, key: str, method: Method) -> Fit | None:
    entry = cache.load_tensors("fits", key)
    if entry is None:
        return None
    tensors, info = entry
    triplets = Triplets(tensors["A"], tensors["B"], tensors["mu"])
    info["losses"] = [(step, loss) for step, loss in info["losses"]]
    return Fit(terms=((method.kernel, triplets),), **info)


def store_fit(cache: Cache, key: str, fit: Fit) -> None:
    ((_, t),) = fit.terms
    info = {name: getattr(fit, name) for name in SCALARS}
    cache.store_tensors("fits", key, {"A": t.A, "B": t.B, "mu": t.mu}, info)
