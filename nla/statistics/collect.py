"""What is known of the inputs of linear layers from calibration data: one pass, one block's statistics alive at a time."""

from collections.abc import Iterator, Sequence
from contextlib import closing
from itertools import pairwise, product

from torch import Tensor
from tqdm import tqdm

from nla.machine.threads import ordered_map
from nla.models.base import Model, Sample
from nla.statistics.blocks import Block, Inputs, Stream, chain
from nla.statistics.fisher import fisher
from nla.statistics.store import StatisticsStore

PANEL = 256  # columns of a Gram matrix that one worker adds up at a time
STREAMED = ("gram", "magnitude")  # what a forward through the blocks gives; `fisher` needs gradients


def collect(
    model: Model,
    layers: Sequence[str],
    kinds: frozenset[str],
    samples: Sequence[Sample],
    fisher_samples: int,
    store: StatisticsStore,
    offload: bool,
) -> None:
    """Put what is missing of these statistics into the store, gradients from the first `fisher_samples` samples only."""
    streamed = kinds.intersection(STREAMED)
    if any(not store.has(kind, layer) for kind, layer in product(streamed, layers)):
        for _ in stream_blocks(model, layers, streamed, samples, store, offload):
            pass
    if "fisher" in kinds and any(not store.has("fisher", layer) for layer in layers):
        for layer, value in fisher(model, layers, samples[:fisher_samples]).items():
            store.store("fisher", layer, value)


def stream_blocks(
    model: Model,
    layers: Sequence[str],
    kinds: frozenset[str],
    samples: Sequence[Sample],
    store: StatisticsStore,
    offload: bool,
) -> Iterator[Block]:
    """Collect block by block; each block is given out when its statistics are stored, before the next one is begun.

    Whoever takes the block may put other layers into it: the next one then sees what those make of the samples.
    """
    device = next(model.module.parameters()).device
    blocks = chain(model, layers)
    stream = Stream(model, blocks[0], samples, device, store.cache.root / "streams" if offload else None)
    tokens = 0
    with tqdm(blocks, "statistics", unit="block", dynamic_ncols=True) as bar:
        for block in bar:
            missing = frozenset(kind for kind, layer in product(kinds, block.layers) if not store.has(kind, layer))
            before = [model.module.get_submodule(layer) for layer in block.layers]
            outputs: list[Tensor] = []
            if missing:
                moments = Moments(missing)
                with Inputs(model.module, block.layers) as inputs:
                    for group in stream.groups():
                        outputs += moments.add(stream, block, inputs, group)
                tokens = moments.store(store)
                store.store_owners(inputs.owner)
            yield block
            changed = any(model.module.get_submodule(n) is not m for n, m in zip(block.layers, before, strict=True))
            if block is not blocks[-1]:
                stream.states = outputs if outputs and not changed else stream.after(block)
            bar.set_postfix_str(f"{tokens} rows", refresh=False)


class Moments:
    """Sums over tokens, in place: of x x^T (the upper triangle, panel by panel) and of |x|, for each input of one block."""

    def __init__(self, kinds: frozenset[str]) -> None:
        self.kinds = kinds
        self.gram: dict[str, Tensor] = {}
        self.magnitude: dict[str, Tensor] = {}
        self.rows: dict[str, int] = {}

    def add(self, stream: Stream, block: Block, inputs: Inputs, group: list[Tensor]) -> list[Tensor]:
        """Run some samples through the block and add up what its layers read; their outputs."""

        def forward(state: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            return inputs.of(lambda: stream.through(block, state))

        with closing(ordered_map(forward, group, stream.device)) as ran:
            outputs, caught = zip(*((stream.kept(output), read) for output, read in ran), strict=True)
        tasks = []
        for name in caught[0]:
            parts = [read[name].float() for read in caught]  # each (rows, in)
            size = parts[0].shape[1]
            self.rows[name] = self.rows.get(name, 0) + sum(map(len, parts))
            if "magnitude" in self.kinds:
                total = self.magnitude.setdefault(name, parts[0].new_zeros(size))
                for x in parts:
                    total += x.abs().sum(0)
            if "gram" in self.kinds:
                gram = self.gram.setdefault(name, parts[0].new_zeros(size, size))
                tasks += [(gram, parts, panel) for panel in panels(size)]
        for _ in ordered_map(add_panel, tasks, stream.device):
            pass
        return list(outputs)

    def store(self, store: StatisticsStore) -> int:
        """Write all of a block's statistics; the number of rows that were seen."""
        for name, total in self.magnitude.items():
            store.store("magnitude", name, total / self.rows[name])
        for name, gram in self.gram.items():
            store.store("gram", name, gram.triu_().add_(gram.triu(1).T))
        return max(self.rows.values())


def panels(size: int) -> list[slice]:
    """range(size) in equal parts of at most PANEL."""
    count = -(-size // PANEL)
    edges = [size * i // count for i in range(count + 1)]
    return [slice(*edge) for edge in pairwise(edges)]


def add_panel(task: tuple[Tensor, list[Tensor], slice]) -> None:
    """G[panel, panel.start:] += x[:, panel]^T x[:, panel.start:]: little more than half of the whole product."""
    gram, parts, panel = task
    for x in parts:
        gram[panel, panel.start :].addmm_(x[:, panel].T, x[:, panel.start :])
