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
from nla.surgery import get_linear
from nla.triplets import Triplets
from nla.workers import ordered_map

FORMAT = 1
CODE = ("nla/kernels", "nla/methods", "nla/solvers", "nla/linalg.py", "nla/triplets.py", "nla/memory.py")
SCALARS = [field.name for field in fields(Fit) if field.name != "terms"]


def fit_model(
    model: nn.Module,
    plan: list[PlanEntry],
    method: Method,
    settings: dict[str, Any],
    seed: int,
    cache: Cache,
) -> Iterator[tuple[str, str, Fit]]:
    """(name, cache key, fit) of every planned matrix, in the order of the plan.

    A result depends on its weight, budget, settings and seed alone: each matrix has its own generator and one thread.

    Raises:
        NonFiniteError: names the matrix; the fits before it stay in the cache.
    """
    device = next(model.parameters()).device

    def fit_one(entry: PlanEntry) -> tuple[str, str, Fit]:
        weight = get_linear(model, entry.spec.name).weight.detach()
        key = digest(
            {
                "format": FORMAT,
                "code": code_digest(*CODE),
                "weight": tensor_digest(weight),
                "n_params": entry.n_params,
                "method": settings,
                "seed": seed,
                "device": device.type,
                "packages": computing_packages(),
            }
        )
        fit = load_fit(cache, key, method)
        if fit is None:
            try:
                fit = method.compress(weight, entry.n_params, torch.Generator().manual_seed(seed))
            except NonFiniteError as error:
                raise NonFiniteError(f"{entry.spec.name}: {error}") from error
            store_fit(cache, key, fit)
        return entry.spec.name, key, fit

    total = sum(e.spec.n_params for e in plan)
    with (
        tqdm(total=total, desc="fit", unit="param", unit_scale=True, dynamic_ncols=True) as bar,
        closing(ordered_map(fit_one, plan, device)) as results,
    ):
        for entry, result in zip(plan, results, strict=True):
            bar.set_postfix_str(f"{entry.spec.name.rpartition('layers.')[2]} {result[2].relative_error:.3f}", refresh=False)
            bar.update(entry.spec.n_params)
            yield result


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
