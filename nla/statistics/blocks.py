"""A model as a chain of blocks: all samples go through one block before the next, so that what is known of a block's inputs
is alive for one block at a time."""

import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nla.machine.threads import ordered_map
from nla.models.base import Model, Sample

BATCH = 1024  # rows (tokens, or image positions) that one worker runs at once: enough for full-speed matrix products
GROUP = 8 * BATCH  # rows whose layer inputs are alive together


@dataclass(frozen=True)
class Block:
    """A part of the model, how it is run, and the qualified names of the chosen layers in it."""

    name: str
    module: nn.Module
    run: Callable[..., Any]
    layers: list[str]


def chain(model: Model, layers: Sequence[str]) -> list[Block]:
    """The children of the smallest ModuleList or Sequential that holds all these layers, up to the last that holds one.

    Where there is none (a layer outside the stack is chosen), the whole model is the only block.
    """
    path = common_path(layers)
    while path and not isinstance(model.module.get_submodule(path), nn.ModuleList | nn.Sequential):
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
    """The longest dotted path that all names begin with, short of a whole name."""
    parts = [name.split(".")[:-1] for name in names]
    shared = []
    for level in zip(*parts, strict=False):
        if len(set(level)) > 1:
            break
        shared.append(level[0])
    return ".".join(shared)


class CaughtError(Exception):
    """Ends a forward once the first block's input is known."""


class Stream:
    """What flows between blocks: tensors (batch, ..., features), and the arguments that every block takes beside them.

    Args:
        folder: keep the tensors in files there, mapped and already unlinked, instead of in memory (of the device).
    """

    def __init__(
        self, model: Model, first: Block, samples: Sequence[Sample], device: torch.device, folder: Path | None = None
    ) -> None:
        self.device, self.folder = device, folder
        self.arguments: dict[int, tuple[list[Any], dict[str, Any]]] = {}  # by batch size: only the last batch may be smaller
        self.states: list[Tensor] = []
        if first.module is model.module:
            self.arguments = {size: ([], {}) for size in range(1, BATCH + 1)}
            self.states = [self.kept(batch) for batch in batches(samples)]
            return

        def catch(module: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
            state, *others = arguments
            self.arguments.setdefault(len(state), (others, keywords))  # samples are of one length, and nothing is padded
            self.states.append(self.kept(state))
            raise CaughtError

        handle = first.module.register_forward_pre_hook(catch, with_kwargs=True)
        try:
            for batch in batches(samples):
                with suppress(CaughtError), torch.no_grad():
                    model.logits(batch.to(device))
        finally:
            handle.remove()

    def kept(self, state: Tensor) -> Tensor:
        """The same numbers where they wait for the next block."""
        if self.folder is None:
            return state
        self.folder.mkdir(parents=True, exist_ok=True)
        file = self.folder / uuid.uuid4().hex
        mapped = torch.from_file(str(file), shared=True, size=state.numel(), dtype=state.dtype).view(state.shape)
        file.unlink()  # the system frees it when the tensor, or the process, is gone
        return mapped.copy_(state)

    @torch.no_grad()
    def through(self, block: Block, state: Tensor) -> Tensor:
        """The output of a block for one batch."""
        arguments, keywords = self.arguments[len(state)]
        output = block.run(state.to(self.device), *arguments, **keywords)
        return output[0] if isinstance(output, tuple) else output

    def after(self, block: Block) -> list[Tensor]:
        """All states behind a block."""
        with closing(ordered_map(lambda state: self.through(block, state), self.states, self.device)) as outputs:
            return [self.kept(output) for output in outputs]

    def groups(self) -> Iterator[list[Tensor]]:
        """Consecutive states that together hold about GROUP rows."""
        group: list[Tensor] = []
        for state in self.states:
            group.append(state)
            if sum(map(rows, group)) >= GROUP:
                yield group
                group = []
        if group:
            yield group


def batches(samples: Sequence[Sample]) -> Iterator[Tensor]:
    """The inputs of samples, as many together as hold BATCH rows, or one."""
    size = max(1, BATCH // rows(samples[0].inputs))
    for begin in range(0, len(samples), size):
        yield torch.cat([sample.inputs for sample in samples[begin : begin + size]])


def rows(state: Tensor) -> int:
    """Positions: of features (..., features), of token ids (batch, tokens), or rows of pixels."""
    return state.numel() // state.shape[-1] if state.is_floating_point() else state.numel()


class Inputs:
    """A context in which the inputs of some layers are recorded: (rows, in), each once, by the first layer that reads it."""

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self.model, self.layers = model, layers
        self.local, self.hooks = threading.local(), ExitStack()
        self.source: dict[str, str] = {}  # layer -> the first layer that reads the same input

    def __enter__(self) -> "Inputs":
        for name in self.layers:
            handle = self.model.get_submodule(name).register_forward_pre_hook(self.hook(name))
            self.hooks.callback(handle.remove)
        return self

    def __exit__(self, *exc: object) -> None:
        self.hooks.close()

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def catch(module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
            x = arguments[0].detach()
            for other, tensor in self.local.caught.items():
                if tensor is x or (tensor.data_ptr(), tensor.shape) == (x.data_ptr(), x.shape):
                    self.source[name] = other
                    return
            self.source[name] = name
            self.local.caught[name] = x

        return catch

    def of(self, run: Callable[[], Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """The result of a forward, and what the layers read in it, by one thread."""
        self.local.caught = {}
        output = run()
        return output, {name: x.flatten(0, -2) for name, x in self.local.caught.items()}
