"""Statistics of layer inputs on disk."""

import torch
from torch import Tensor

from nla.machine.cache import Cache, digest
from nla.machine.errors import NonFiniteError
from nla.matrix.inputs import Statistics


class StatisticsStore:
    """Statistics on disk, one file for each kind and input. Layers that read the same input share a file.

    Args:
        made_from: digest of weights, samples, code and packages.
    """

    def __init__(self, cache: Cache, made_from: str) -> None:
        self.cache, self.made_from = cache, made_from
        self.verified: set[str] = set()  # keys whose files this object found undamaged

    def key(self, kind: str, layer: str) -> str:
        return digest([self.made_from, kind, layer])

    def source(self, kind: str, layer: str) -> str | None:
        """The layer whose name the statistic is stored under: the first that reads the same input; None if not yet known."""
        return layer if kind == "fisher" else self.cache.load_json("statistics", self.key("source", layer))

    def has(self, kind: str, layer: str) -> bool:
        """Whether the statistic is on disk and undamaged."""
        source = self.source(kind, layer)
        key = "" if source is None else self.key(kind, source)
        if key and key not in self.verified and self.cache.load_tensors("statistics", key) is not None:
            self.verified.add(key)
        return key in self.verified

    def store(self, kind: str, layer: str, value: Tensor) -> None:
        """Store a statistic of the input that `layer` is the first to read.

        Raises:
            NonFiniteError: the statistic has NaN or infinite values; it names the layer.
        """
        if not bool(torch.isfinite(value).all()):
            raise NonFiniteError(f"{layer}: the {kind} of its inputs over the calibration samples is not finite")
        self.cache.store_tensors("statistics", self.key(kind, layer), {kind: value.cpu()}, {"layer": layer})

    def store_sources(self, sources: dict[str, str]) -> None:
        """Store {layer: the first layer that reads the same input}."""
        for layer, source in sources.items():
            self.cache.store_json("statistics", self.key("source", layer), source)

    def load(self, needs: frozenset[str], layer: str, device: torch.device) -> Statistics:
        """The statistics of one layer that a method needs, on `device`.

        Raises:
            RuntimeError: a statistic is not in the cache; it must have been collected before.
        """
        found = {}
        for kind in needs:
            source = self.source(kind, layer)
            entry = None if source is None else self.cache.load_tensors("statistics", self.key(kind, source))
            if entry is None:
                raise RuntimeError(f"the {kind} of {layer} left the cache while the run went on; start it again")
            found[kind] = entry[0][kind].to(device)
        return Statistics(**found)
