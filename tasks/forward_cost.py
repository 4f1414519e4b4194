"""Seconds and memory of a model's forward pass and of its training step."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nla.machine.cache import Cache
from nla.machine.errors import UserError, require_integer
from nla.machine.peak_memory import PeakMemory
from nla.models.base import Inventory, LanguageModel, Model, Sample
from tasks.base import Figures, Task, require_same_kind, resident_bytes
from tasks.data import SETS
from tasks.data.base import Data


class ForwardCost(Task):
    """Seconds and peak memory of one forward pass without gradients, and of one training step, of the whole model.

    A training step is a forward pass, the model's own loss, and its gradient for all parameters, without an optimiser. Both
    read the same random samples as one batch. They use all of torch's threads, and nothing else runs beside them. No figure
    is taken from the cache: the dense and the compressed model of a run are measured within the same minutes.

    Args:
        data: text or images; None if the chosen data is neither.
        samples: windows of text, or images, that the model reads at once.
        length: tokens in a window.
        repeats: how often each is timed, after one pass whose memory is measured.
        seed: of the samples.
    """

    name = "forward_cost"

    def __init__(self, data: Data | None, samples: int, length: int, repeats: int, seed: int) -> None:
        if data is None:
            raise UserError(f"task=forward_cost needs text or images: data={SETS['text']}, or data={SETS['images']}")
        for setting, value, least in (("samples", samples, 1), ("length", length, 2), ("repeats", repeats, 1)):
            require_integer(f"task.{setting}", value, least)
        self.data, self.samples, self.length, self.repeats, self.seed = data, samples, length, repeats, seed

    def check(self, inventory: Inventory) -> None:
        require_same_kind(self.data, inventory)
        if inventory.reads == "text" and self.length > inventory.limit:
            raise UserError(f"task.length={self.length} is longer than the {inventory.limit} tokens the model can read")

    def evaluate(self, model: Model, cache: Cache, state: str, label: str) -> dict[str, Figures]:
        """inference_seconds and training_seconds (median, and of the fastest and slowest repetition);
        inference_peak_bytes and training_peak_bytes beside weights and samples (of training: with the gradients);
        resident_bytes of the model; windows and their tokens, or images; repeats."""
        device = next(model.module.parameters()).device
        drawn = self.data.samples(model, self.samples, self.length, self.seed)
        batch = Sample(*(torch.cat(parts) for parts in zip(*drawn, strict=True))).to(device)
        with tqdm(desc=label, total=2 * (1 + self.repeats), unit="pass", dynamic_ncols=True) as bar:
            figures = self.measured("inference", lambda: infer(model, batch), device, bar)
            with all_trainable(model.module) as parameters:
                figures |= self.measured("training", lambda: train(model, batch, parameters), device, bar)
        figures |= {"resident_bytes": resident_bytes(model.module), "repeats": self.repeats}
        if isinstance(model, LanguageModel):
            return {self.data.name: figures | {"windows": self.samples, "tokens": batch.inputs.numel()}}
        return {self.data.name: figures | {"images": self.samples}}

    def measured(self, what: str, work: Callable[[], object], device: torch.device, bar: tqdm) -> Figures:
        """Seconds and peak bytes of the work. The first pass measures memory, which takes time of its own."""
        with PeakMemory(device) as memory:
            work()
        bar.update()
        seconds = []
        for _ in range(self.repeats):
            seconds.append(timed(work, device))
            bar.update()
        return {
            f"{what}_seconds": median(seconds),
            f"{what}_seconds_fastest": min(seconds),
            f"{what}_seconds_slowest": max(seconds),
            f"{what}_peak_bytes": memory.peak_bytes,
        }


@torch.inference_mode()
def infer(model: Model, batch: Sample) -> Tensor:
    return model.logits(batch.inputs)


def train(model: Model, batch: Sample, parameters: list[nn.Parameter]) -> tuple[Tensor, ...]:
    """The gradients of the model's own loss. A parameter that the loss does not depend on has zeros."""
    return torch.autograd.grad(model.loss(batch), parameters, materialize_grads=True)


@contextmanager
def all_trainable(module: nn.Module) -> Iterator[list[nn.Parameter]]:
    """Context in which every parameter requires a gradient. Retraining has frozen some."""
    parameters = list(module.parameters())
    before = [p.requires_grad for p in parameters]
    module.requires_grad_()
    try:
        yield parameters
    finally:
        for p, wanted in zip(parameters, before, strict=True):
            p.requires_grad_(wanted)


def timed(work: Callable[[], object], device: torch.device) -> float:
    """Seconds that the work takes."""
    wait_for(device)
    begun = time.perf_counter()
    work()
    wait_for(device)
    return time.perf_counter() - begun


def wait_for(device: torch.device) -> None:
    """Wait until a GPU has done all work that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
