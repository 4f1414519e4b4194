"""A model as a chain of blocks. All samples pass through one block before the next, so that the statistics of only one block
are in memory."""

import os
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nla.compressed.surgery import copy_with_same_tensors
from nla.machine.errors import UserError
from nla.machine.files import naming
from nla.machine.threads import ordered_map
from nla.models.base import Model, Sample

BATCH = 1024  # rows (tokens, or image positions) that one worker runs at once: enough for full-speed matrix products
GROUP = 8 * BATCH  # rows whose layer inputs are in memory together
CHECKED = 2  # batches on which a model is checked to be a chain of blocks
REMEDY = "use a method that reads no inputs, such as method=svd, without refine="


@dataclass(frozen=True)
class Block:
    """A part of the model, the function that runs it, and the qualified names of the chosen layers in it."""

    name: str
    module: nn.Module
    run: Callable[..., Any]
    layers: list[str]

    def copied(self, model: Model) -> "Block":
        """The block with its layers of now, which share their tensors. The model's own layers may then be replaced."""
        module = copy_with_same_tensors(self.module)
        whole = self.module is model.module
        return replace(self, module=module, run=replace(model, module=module).logits if whole else module)

    def submodules(self, layers: Sequence[str]) -> dict[str, nn.Module]:
        """{layer: its module} of some of the block's layers."""
        prefix = f"{self.name}." if self.name else ""
        return {layer: self.module.get_submodule(layer.removeprefix(prefix)) for layer in layers}


def chain(model: Model, layers: Sequence[str]) -> list[Block]:
    """The blocks of the model, up to the last one that holds a chosen layer.

    The blocks are the children of the smallest ModuleList or Sequential that holds all chosen layers. If none holds them all
    (a layer outside the stack is chosen), the whole model is the only block.

    Args:
        layers: qualified names of the chosen layers.
    """
    path = common_path(layers)
    parents = {layer.rpartition(".")[0] for layer in layers}
    # a block that is itself a chosen layer would be replaced
    while path and (path in parents or not isinstance(model.module.get_submodule(path), nn.ModuleList | nn.Sequential)):
        path = path.rpartition(".")[0]
    if not path:
        return [Block("", model.module, model.logits, list(layers))]
    blocks = []
    for child, module in model.module.get_submodule(path).named_children():
        name = f"{path}.{child}"
        blocks.append(Block(name, module, module, [layer for layer in layers if layer.startswith(f"{name}.")]))
    while not blocks[-1].layers:
        blocks.pop()
    return blocks


def common_path(names: Sequence[str]) -> str:
    """The longest dotted path that is a parent of all names."""
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


class CaughtError(Exception):
    """Ends a forward pass once what it was made for is recorded."""


class Stream:
    """The hidden states of all samples between two blocks: tensors (batch, ..., features), and the blocks' other arguments.

    A block's other arguments, such as its mask, may differ from those of other blocks. They must depend on the size of the
    batch only, as masks and positions do, because samples have one length and no padding. And a block must read what the block
    before it returns. Both are checked on the first two batches.

    Args:
        blocks: the whole chain.
        folder: keep the tensors in memory-mapped files in this folder; None to keep them in the device's memory.

    Raises:
        UserError: the model is no such chain.
    """

    def __init__(
        self, model: Model, blocks: Sequence[Block], samples: Sequence[Sample], device: torch.device, folder: Path | None = None
    ) -> None:
        self.device, self.folder = device, folder
        self.arguments: dict[tuple[str, int], tuple[list[Any], dict[str, Any]]] = {}  # by block and batch size
        self.states: list[Tensor] = []
        self.checked = 0  # batches that went through the whole chain
        self.returned: Tensor | None = None  # by the block that ran last
        if blocks[0].module is model.module:
            self.arguments = {(blocks[0].name, size): ([], {}) for size in range(1, BATCH + 1)}
            self.states = [self.kept(batch) for batch in batches(samples)]
            return
        with ExitStack() as hooks:
            for block in blocks:
                hooks.callback(block.module.register_forward_pre_hook(self.hook(block, blocks), with_kwargs=True).remove)
                hooks.callback(block.module.register_forward_hook(self.remember).remove)
            for batch in batches(samples):
                with suppress(CaughtError), torch.no_grad():
                    model.logits(batch.to(device))
        self.returned = None
        if not self.states:
            raise UserError(f"the model does not call {blocks[0].name}, so that its blocks cannot be run one by one; {REMEDY}")

    def hook(self, block: Block, blocks: Sequence[Block]) -> Callable[..., None]:
        """Records the first block's states. The first batches, and the first of each size, go on to the last block."""

        def catch(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            state, *others = arguments
            place, last = (block.name, len(state)), block is blocks[-1]
            if block is blocks[0]:
                self.states.append(self.kept(state))
            elif not same(state, self.returned):
                raise UserError(f"the model changes what {block.name} reads between two blocks; {REMEDY}")
            if not same(self.arguments.setdefault(place, (others, keywords)), (others, keywords)):
                raise UserError(f"{block.name} reads more than hidden states, masks and positions; {REMEDY}")
            self.checked += last
            if last or (self.checked >= CHECKED and (blocks[-1].name, len(state)) in self.arguments):
                raise CaughtError

        return catch

    def remember(self, module: nn.Module, arguments: tuple[Any, ...], output: Any) -> None:
        self.returned = output[0] if isinstance(output, tuple) else output

    def kept(self, state: Tensor) -> Tensor:
        """A state as it is kept until the next block: itself, or a copy in a memory-mapped file."""
        if self.folder is None:
            return state
        file = self.folder / uuid.uuid4().hex
        with naming(file):
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                with file.open("wb") as space:  # on a full disk, a write to a mapped file without space kills the process
                    os.posix_fallocate(space.fileno(), 0, max(1, state.nbytes))
                mapped = torch.from_file(str(file), shared=True, size=state.numel(), dtype=state.dtype).view(state.shape)
            finally:
                file.unlink(missing_ok=True)  # the system frees the space when the tensor is freed or the process ends
        return mapped.copy_(state)

    @torch.no_grad()
    def through(self, block: Block, state: Tensor) -> Tensor:
        """The output of a block for one batch, without a gradient: (batch, ..., features)."""
        return self.run(block, state)

    def run(self, block: Block, state: Tensor) -> Tensor:
        """The output of a block for one batch: (batch, ..., features)."""
        arguments, keywords = self.arguments[block.name, len(state)]
        output = block.run(state.to(self.device), *arguments, **keywords)
        return output[0] if isinstance(output, tuple) else output

    def after(self, block: Block) -> list[Tensor]:
        """The outputs of a block for all states."""
        with closing(ordered_map(lambda state: self.through(block, state), self.states, self.device)) as outputs:
            return [self.kept(output) for output in outputs]

    def groups(self) -> Iterator[list[Tensor]]:
        """Lists of consecutive states, each with about GROUP rows in all."""
        group: list[Tensor] = []
        for state in self.states:
            group.append(state)
            if sum(map(rows, group)) >= GROUP:
                yield group
                group = []
        if group:
            yield group


def batches(samples: Sequence[Sample]) -> Iterator[Tensor]:
    """The samples' inputs in batches of at most BATCH rows, but of at least one sample."""
    size = batch_size(rows(samples[0].inputs))
    for begin in range(0, len(samples), size):
        yield torch.cat([sample.inputs for sample in samples[begin : begin + size]])


def batch_size(each: int) -> int:
    """Number of samples of a batch, if a sample has `each` rows."""
    return max(1, BATCH // each)


def rows(state: Tensor) -> int:
    """Number of positions: of features (..., features) or token ids (batch, tokens); of images, rows of pixels."""
    return state.numel() // state.shape[-1] if state.is_floating_point() else state.numel()


def same(first: Any, second: Any) -> bool:
    """Whether two arguments of a block are equal: tensors by their numbers, lists, tuples and dictionaries by their parts."""
    if isinstance(first, Tensor) and isinstance(second, Tensor):
        return first is second or torch.equal(first, second)
    if isinstance(first, dict) and isinstance(second, dict):
        return first.keys() == second.keys() and all(same(value, second[key]) for key, value in first.items())
    if isinstance(first, list | tuple) and isinstance(second, list | tuple):
        return len(first) == len(second) and all(map(same, first, second))
    return type(first) is type(second) and bool(first == second)


class Inputs:
    """Context that records the inputs (rows, in) of some layers, each once: for the first layer that reads it.

    Every run must call each of the layers once. Otherwise some of their inputs would be missing.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        self.layers = layers
        self.local, self.hooks = threading.local(), ExitStack()
        self.source: dict[str, str] = {}  # layer -> the first layer that reads the same input

    def __enter__(self) -> "Inputs":
        for name, module in self.layers.items():
            self.hooks.callback(module.register_forward_pre_hook(self.hook(name)).remove)
        return self

    def __exit__(self, *exc: object) -> None:
        self.hooks.close()

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def catch(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach()
            self.local.calls.append(name)
            for other, tensor in self.local.caught.items():
                if tensor is x or (tensor.data_ptr(), tensor.shape) == (x.data_ptr(), x.shape):
                    self.source[name] = other
                    return
            self.source[name] = name
            self.local.caught[name] = x

        return catch

    def of(self, run: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The result of `run()`, and {layer: input (rows, in)} of the layers that it called in this thread.

        Raises:
            UserError: it did not call one of the layers, or called one twice.
        """
        self.local.caught, self.local.calls = {}, []
        output = run()
        for name in self.layers:
            count = self.local.calls.count(name)
            if count != 1:
                raise UserError(
                    f"{name} is called {count} times while the model reads a batch of samples, so that its inputs cannot be "
                    f"measured: once is allowed; leave it out with select.exclude='{re.escape(name)}'"
                )
        return output, {name: x.flatten(0, -2) for name, x in self.local.caught.items()}
