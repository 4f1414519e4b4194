"""Collects statistics of the inputs of linear layers in one pass. Only one block's statistics are in memory."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from copy import copy
from itertools import pairwise, product, repeat

import torch
from torch import Tensor
from tqdm import tqdm

from nla.machine.threads import ordered_map
from nla.models.base import Model, Sample
from nla.statistics.blocks import Block, Inputs, Stream, chain
from nla.statistics.fisher import fisher
from nla.statistics.store import StatisticsStore

STRIPE = 256  # columns of a Gram matrix (sum of x x^T) that one worker adds up at a time
STREAMED = ("gram", "magnitude")  # kinds that need only forward passes of one model; `fisher` needs gradients, `cross` two
Task = tuple[Tensor, list[Tensor], list[Tensor], slice]  # see add_stripe


def collect(
    model: Model,
    layers: Sequence[str],
    kinds: frozenset[str],
    samples: Sequence[Sample],
    fisher_samples: int,
    store: StatisticsStore,
    offload: bool,
) -> None:
    """Compute the statistics that the store lacks, and store them.

    Args:
        layers: qualified names of the layers whose inputs are measured.
        kinds: statistics to collect, by their names in `nla.matrix.inputs.Statistics`.
        fisher_samples: `fisher` is computed from only so many samples, the first ones.
        offload: keep the hidden states between two blocks in files instead of in memory.
    """
    streamed = kinds.intersection(STREAMED)
    if any(not store.has(kind, layer) for kind, layer in product(streamed, layers)):
        stream = StatisticsStream(model, layers, streamed, samples, store, offload)
        for block in stream.blocks():
            stream.measure(block)
            stream.advance(block)
    if "fisher" in kinds and any(not store.has("fisher", layer) for layer in layers):
        for layer, value in fisher(model, layers, samples[:fisher_samples]).items():
            store.store("fisher", layer, value)


class StatisticsStream:
    """Passes all samples through a model, one block after the other, and collects statistics of the layers' inputs.

    Call `measure` and then `advance` for each of `blocks()`, in order. Between the two calls, the layers of the block may be
    replaced. Layers that are measured after that, and the following blocks, then read the outputs of the new layers.
    `advance_dense` passes the samples through the dense block.

    Args:
        layers, kinds, offload: as in `collect`; `cross` needs with_dense and `advance_dense`.
        with_dense: keep the dense model's hidden states as well.

    Attributes:
        stream: the inputs of the current block, behind the blocks as they are now.
        dense: the same behind the dense blocks.
    """

    def __init__(
        self,
        model: Model,
        layers: Sequence[str],
        kinds: frozenset[str],
        samples: Sequence[Sample],
        store: StatisticsStore,
        offload: bool,
        with_dense: bool = False,
    ) -> None:
        device = next(model.module.parameters()).device
        self.model, self.kinds, self.store, self.chain = model, kinds, store, chain(model, layers)
        self.stream = Stream(model, self.chain, samples, device, store.cache.root / "streams" if offload else None)
        self.dense = copy(self.stream) if with_dense else None
        self.outputs: list[Tensor] = []
        self.dense_outputs: list[Tensor] = []
        self.dense_block = self.chain[0]  # the current block with its dense layers
        self.rows = 0

    def blocks(self) -> Iterator[Block]:
        """The blocks in order, with a progress bar."""
        with tqdm(self.chain, "statistics" if self.kinds else "blocks", unit="block", dynamic_ncols=True) as bar:
            for block in bar:
                self.dense_block = block.copied(self.model) if self.dense and block.layers else block
                self.outputs, self.dense_outputs = [], []
                yield block
                bar.set_postfix_str(f"{self.rows} rows", refresh=False)

    def parts(self, block: Block) -> list[list[str]]:
        """The chosen layers of a block in the order in which it calls them. Those that read the same input are one part."""
        with Inputs(block.submodules(block.layers)) as inputs:
            inputs.of(lambda: self.stream.through(block, self.stream.states[0]))
        found: dict[str, list[str]] = {}
        for layer, first in inputs.source.items():
            found.setdefault(first, []).append(layer)
        return list(found.values())

    def measure(self, block: Block, layers: Sequence[str] | None = None, replaced: bool = False) -> None:
        """Compute and store those statistics of the block's layers that the store lacks.

        Args:
            layers: of the block; None for all.
            replaced: layers will be replaced, so that the outputs of those of now are not kept for `advance`.
        """
        layers = block.layers if layers is None else layers
        missing = frozenset(kind for kind, layer in product(self.kinds, layers) if not self.store.has(kind, layer))
        if missing:
            moments = Moments(missing, self.stream.device)
            crossed = self.dense is not None and "cross" in missing
            dense_groups = self.dense.groups() if self.dense and crossed else repeat(None)
            dense_layers = self.dense_block.submodules(layers) if crossed else {}
            read = not replaced and block is not self.chain[-1]  # of a whole model, outputs are logits
            self.dense_outputs = []
            with Inputs(block.submodules(layers)) as inputs, Inputs(dense_layers) as dense_inputs:
                for group, dense_group in zip(self.stream.groups(), dense_groups, strict=False):
                    outputs, caught = run(self.stream, block, inputs, group)
                    moments.add(caught)
                    if read:
                        self.outputs += [self.stream.kept(output) for output in outputs]
                    if self.dense and dense_group:
                        outputs, dense_caught = run(self.dense, self.dense_block, dense_inputs, dense_group)
                        self.dense_outputs += [self.dense.kept(output) for output in outputs]
                        moments.add_cross(dense_caught, caught)
            self.rows = moments.store(self.store)
            self.store.store_sources(inputs.source)

    def advance_dense(self) -> None:
        """Pass all samples of the dense model through the dense block. Call it after the last `measure` of the block."""
        assert self.dense is not None
        self.dense.states = self.dense_outputs or self.dense.after(self.dense_block)

    def advance(self, block: Block) -> None:
        """Pass all samples through the block as it is now."""
        if block is not self.chain[-1]:
            self.stream.states = self.outputs or self.stream.after(block)


def run(stream: Stream, block: Block, inputs: Inputs, group: list[Tensor]) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Run some states of a stream through a block: its outputs, and {layer: its input for each state (rows, in), fp32}."""

    def forward(state: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        return inputs.of(lambda: stream.through(block, state))

    with closing(ordered_map(forward, group, stream.device)) as ran:
        outputs, caught = zip(*ran, strict=True)
    return list(outputs), {name: [read[name].float() for read in caught] for name in caught[0]}


class Moments:
    """Running sums over tokens, for each input x of one block: x x^T (upper triangle, stripe by stripe), |x|, and z x^T."""

    def __init__(self, kinds: frozenset[str], device: torch.device) -> None:
        self.kinds, self.device = kinds, device
        self.gram: dict[str, Tensor] = {}
        self.cross: dict[str, Tensor] = {}
        self.magnitude: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    def add(self, caught: dict[str, list[Tensor]]) -> None:
        """Add inputs of layers to the sums: {layer: parts (rows, in)}."""
        tasks = []
        for name, parts in caught.items():
            size = parts[0].shape[1]
            self.rows[name] = self.rows.get(name, 0) + sum(map(len, parts))
            if "magnitude" in self.kinds:
                total = self.magnitude.setdefault(name, parts[0].new_zeros(size))
                for x in parts:
                    total += x.abs().sum(0)
            if "gram" in self.kinds:
                gram = self.gram.setdefault(name, parts[0].new_zeros(size, size))
                tasks += [(gram[stripe, stripe.start :], parts, parts, stripe) for stripe in stripes(size)]
        self.work(tasks)

    def add_cross(self, dense: dict[str, list[Tensor]], caught: dict[str, list[Tensor]]) -> None:
        """Add z x^T, where z are the inputs of the same layers for the same tokens in the dense model."""
        tasks = []
        for name, parts in caught.items():
            size = parts[0].shape[1]
            cross = self.cross.setdefault(name, parts[0].new_zeros(size, size))
            tasks += [(cross[stripe], dense[name], parts, stripe) for stripe in stripes(size)]
        self.work(tasks)

    def work(self, tasks: list[Task]) -> None:
        for _ in ordered_map(add_stripe, tasks, self.device):
            pass

    def store(self, store: StatisticsStore) -> int:
        """Store the statistics of the block. Returns the number of rows (tokens) that they are sums over."""
        for name, total in self.magnitude.items():
            store.store("magnitude", name, total / self.rows[name])
        for name, gram in self.gram.items():
            mirror(gram)
            store.store("gram", name, gram)
        for name, cross in self.cross.items():
            store.store("cross", name, cross)
        return max(self.rows.values())


def mirror(gram: Tensor) -> None:
    """Copy the upper triangle of a matrix to the lower one, in place."""
    for stripe in stripes(len(gram)):
        corner = gram[stripe, stripe]
        corner.copy_(corner.triu() + corner.triu(1).T)
        gram[stripe.stop :, stripe] = gram[stripe, stripe.stop :].T


def stripes(size: int) -> list[slice]:
    """Slices that divide range(size) into nearly equal parts of at most STRIPE."""
    count = -(-size // STRIPE)
    edges = [size * i // count for i in range(count + 1)]
    return [slice(*edge) for edge in pairwise(edges)]


def add_stripe(task: Task) -> None:
    """sum[stripe] += z[:, stripe]^T x, for the last columns of x, as many as the sum has.

    The stripes of x^T x have no columns before their own rows, so that all of them cost little more than half of x^T x.
    """
    total, left, right, stripe = task
    for z, x in zip(left, right, strict=True):
        total.addmm_(z[:, stripe].T, x[:, x.shape[1] - total.shape[1] :])
