"""Fit groups of matrices, or load their fits from the cache."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import fields
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from nla.budget.plan import PlannedGroup
from nla.compressed.surgery import get_linear
from nla.machine.cache import Cache, digest, tensor_digest
from nla.machine.errors import NonFiniteError
from nla.machine.provenance import code_digest, computing_packages, target_modules
from nla.machine.threads import ordered_map
from nla.methods.base import Method
from nla.methods.fit import Fit, counted_once
from nla.statistics.store import StatisticsStore
from nla.terms.state import pack, unpack

FORMAT = 3
FIGURES = [field.name for field in fields(Fit) if field.name != "term"]
NamedFits = dict[str, Fit]


def fit_groups(
    model: nn.Module,
    groups: Sequence[PlannedGroup],
    method: Method,
    settings: dict[str, Any],
    seed: int,
    kinds: frozenset[str],
    store: StatisticsStore,
    bar: tqdm,
) -> Iterator[NamedFits]:
    """The fits of each group by the names of its matrices, in the order of the groups.

    A result depends only on the group's weights, statistics and budget, the settings and the seed. To ensure this, each group
    has its own random generator and one thread.

    Args:
        settings: the method's configuration.
        kinds: the statistics that the method gets.

    Raises:
        NonFiniteError: a fit is not finite. The message names the matrices; finished fits stay in the cache.
    """

    def fit_one(group: PlannedGroup) -> NamedFits:
        names = [matrix.spec.name for matrix in group.matrices]
        weights = [get_linear(model, name).weight.detach() for name in names]
        device = weights[0].device  # a model may be spread over several GPUs
        key = digest(
            {
                "format": FORMAT,
                "code": code_digest("nla.terms.state", *target_modules(settings)),
                "weights": [tensor_digest(weight) for weight in weights],
                "statistics": [store.key(kind, name) for name in names for kind in sorted(kinds)],
                "bits": group.bits,
                "method": settings,
                "seed": seed,
                "device": device.type,
                "packages": computing_packages(),
            }
        )
        fits = load_fits(store.cache, key, device)
        if fits is None:
            statistics = [store.load(kinds, name, device) for name in names]
            try:
                fits = counted_once(method.compress(weights, group.bits, statistics, torch.Generator().manual_seed(seed)))
            except NonFiniteError as error:
                raise NonFiniteError(f"{', '.join(names)}: {error}") from error
            store_fits(store.cache, key, fits)
        return dict(zip(names, fits, strict=True))

    with closing(ordered_map(fit_one, groups, next(model.parameters()).device)) as results:
        for group, fits in zip(groups, results, strict=True):
            name, last = list(fits.items())[-1]
            bar.set_postfix_str(f"{name.rpartition('layers.')[2]} {last.relative_error:.3f}", refresh=False)
            bar.update(sum(matrix.spec.n_params for matrix in group.matrices))
            yield fits


def load_fits(cache: Cache, key: str, device: torch.device) -> list[Fit] | None:
    """The fits of a group, in the order in which they were stored, or None if the cache has none."""
    entry = cache.load_tensors("fits", key)
    if entry is None:
        return None
    tensors, info = entry
    terms = unpack({name: tensor.to(device) for name, tensor in tensors.items()}, info["terms"])
    fits = []
    for number, figures in enumerate(info["figures"]):
        figures["losses"] = [(step, loss) for step, loss in figures["losses"]]
        fits.append(Fit(term=terms[str(number)], **figures))
    return fits


def store_fits(cache: Cache, key: str, fits: Sequence[Fit]) -> None:
    tensors, terms = pack({str(number): fit.term for number, fit in enumerate(fits)})
    figures = [{name: getattr(fit, name) for name in FIGURES} for fit in fits]
    cache.store_tensors("fits", key, tensors, {"terms": terms, "figures": figures})
