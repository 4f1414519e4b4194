"""Fit the matrices block by block, for methods and refinements that read what compressed earlier layers return."""

from collections.abc import Iterable, Iterator

from tqdm import tqdm

from nla.budget.plan import PlannedGroup
from nla.compressed.surgery import swap
from nla.harness.checks import require_two_batches
from nla.harness.request import PreparedRun
from nla.machine.cache import digest
from nla.models.base import Model
from nla.refine.block import Refined, load_refined, refine_block
from nla.stages.calibrate import Calibration, compressed_blocks, dense_statistics, sequential_statistics
from nla.stages.fit_groups import NamedFits, fit_groups
from nla.statistics.blocks import Block
from nla.statistics.collect import StatisticsStream


def fit_block_by_block(
    prepared: PreparedRun, model: Model, calibration: Calibration, bar: tqdm, refined: list[Refined]
) -> Iterator[NamedFits]:
    """The fits of all groups, block by block. The terms of a block are put into the model before the next block begins.

    A sequential method is fitted to inputs that passed all that was compressed before: the earlier blocks, and those layers of
    the block that run earlier. It may correct their errors. A refinement trains the terms of a block on such inputs.

    Args:
        refined: gets the result of each refined block.
    """
    method, plan, settings = prepared.method, prepared.plan, prepared.values["method"]
    seed, offload = prepared.values["seed"], prepared.values["statistics"]["offload"]
    kinds = method.needs | ({"cross"} if method.correction else frozenset())
    statistics_of = sequential_statistics if method.sequential else dense_statistics
    store, measured = statistics_of(prepared, calibration), kinds if method.sequential else frozenset()
    with_dense = prepared.refinement is not None or method.correction > 0
    stream = StatisticsStream(model, plan.layers, measured, calibration.samples, store, offload, with_dense)
    refinement = BlockRefinement(prepared, calibration, stream) if prepared.refinement else None
    for block in stream.blocks():
        for layers in stream.parts(block) if method.sequential else [block.layers]:
            stream.measure(block, layers, replaced=True)
            groups = slowest_first(plan.of_layers(layers).groups)
            found = NamedFits()
            for fits in fit_groups(model.module, groups, method, settings, seed, kinds, store, bar):
                found |= fits
                yield fits
            swap(model.module, {name: result.term for name, result in found.items()})
        if method.correction or (refinement and block in refinement.missing):
            stream.advance_dense()
        if refinement and block.layers:
            refined.append(refinement.refine(block))
        if method.sequential or (refinement and block in refinement.before_missing):
            stream.advance(block)


def slowest_first(groups: Iterable[PlannedGroup]) -> list[PlannedGroup]:
    """A block's groups in falling order of their time: the block waits for its last fit, while other workers are idle."""

    def time(group: PlannedGroup) -> int:
        return sum(matrix.bits * matrix.spec.in_features for matrix in group.matrices)  # weighted products grow with `in`

    return sorted(groups, key=time, reverse=True)


class BlockRefinement:
    """Refines the blocks of a model in order, beside a stream that passes the compressed blocks.

    Attributes:
        missing: the blocks up to the last one without a result in the cache. The streams must pass them.
        before_missing: the same without that last one.

    Raises:
        UserError: there are too few samples to hold some out.
    """

    def __init__(self, prepared: PreparedRun, calibration: Calibration, stream: StatisticsStream) -> None:
        assert prepared.refinement is not None
        self.settings, self.seed, self.cache = prepared.refinement, prepared.values["seed"], prepared.cache
        self.stream = stream
        require_two_batches(len(calibration.samples), len(stream.stream.states[0]))
        made_from = compressed_blocks(prepared, calibration)
        self.keys = {block.name: digest([made_from, block.name]) for block in stream.chain if block.layers}
        lacking = [i for i, block in enumerate(stream.chain) if self.lacks(block)]
        self.missing = stream.chain[: lacking[-1] + 1] if lacking else []
        self.before_missing = self.missing[:-1]

    def lacks(self, block: Block) -> bool:
        """Whether the block is to be refined, and the cache has no undamaged result."""
        return block.name in self.keys and self.cache.load_tensors("refined", self.keys[block.name]) is None

    def refine(self, block: Block) -> Refined:
        """Train the compressed block on the outputs of the dense block, or load the result from the cache.

        The dense stream has passed the block, the other one has not.
        """
        key = self.keys[block.name]
        with self.cache.lock("refined", key):
            known = load_refined(block, self.cache, key, self.seed)
            if known is None and block not in self.missing:
                raise RuntimeError(f"the refined {block.name} left the cache while the run went on; start it again")
            if known is not None:
                return known
            assert self.stream.dense is not None
            targets = self.stream.dense.states
            return refine_block(block, self.stream.stream, targets, self.settings, self.seed, self.cache, key)
