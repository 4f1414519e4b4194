"""The loss of a retraining: the model's own, and what it may learn from the dense model beside it."""

import threading
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import log_softmax

from nla.compressed.layer import CompressedLinear
from nla.compressed.surgery import get_linear
from nla.models.base import Model, Sample
from nla.retrain.settings import Retraining
from nla.statistics.blocks import Block, chain

ROWS = 16  # of logits, compared at once


class Distillation:
    """loss + logits * T^2 KL(dense || compressed) + features * squared difference + perturbation * mean(max|W' - W|^2)

    Logits are softened by the temperature T (Hinton et al., 2015). Features are the outputs of the blocks, as in
    `relative_difference`. The last is PELA's weight perturbation (Guo et al., 2023), the mean over matrices.

    Args:
        layers: qualified names of the compressed matrices.
    """

    def __init__(self, model: Model, dense: Model, layers: list[str], settings: Retraining) -> None:
        self.model, self.dense, self.settings = model, dense, settings
        self.compressed = {name: model.module.get_submodule(name) for name in layers}
        self.weights = {name: get_linear(dense.module, name).weight for name in layers}
        pairs = ((model, chain(model, layers)), (dense, chain(dense, layers)))
        self.features = [Features(blocks) if settings.features else None for _, blocks in pairs]

    def __call__(self, sample: Sample) -> Tensor:
        logits, seen = self.run(self.model, sample, self.features[0])
        with torch.no_grad():
            wanted, shown = self.run(self.dense, sample, self.features[1])
        loss = self.model.loss_of(logits, sample)
        if self.settings.logits:
            loss = loss + self.settings.logits * softened_divergence(logits, wanted, self.settings.temperature)
        if self.settings.features:
            parts = [relative_difference(a, b) for a, b in zip(seen, shown, strict=True)]
            loss = loss + self.settings.features * torch.stack(parts).mean()
        if self.settings.perturbation:
            loss = loss + self.settings.perturbation * self.largest_changes().square().mean()
        return loss

    def close(self) -> None:
        """Take the hooks off both models."""
        for features in filter(None, self.features):
            features.hooks.close()

    @staticmethod
    def run(model: Model, sample: Sample, features: "Features | None") -> tuple[Tensor, list[Tensor]]:
        if features is None:
            return model.logits(sample.inputs), []
        return features.of(lambda: model.logits(sample.inputs))

    def largest_changes(self) -> Tensor:
        """max|W' - W| of every compressed matrix: (matrices,)"""
        return torch.stack(
            [
                (layer.term.dense() - self.weights[name]).abs().amax().float()
                for name, layer in self.compressed.items()
                if isinstance(layer, CompressedLinear)
            ]
        )


def relative_difference(features: Tensor, wanted: Tensor) -> Tensor:
    """2 |f - w|^2 / (|f|^2 + |w|^2), mean over positions, from 0 to 4: (..., features) twice -> ()

    At each position by itself: the first token of a text has features hundreds of times larger than all others in models like
    LLaMA (massive activations, Sun et al., 2024), and would be all that counts. By the size of both, because a compressed
    model may have them where the dense one has none.
    """
    f, w = features.float(), wanted.float()
    return (2 * (f - w).square().sum(-1) / (f.square().sum(-1) + w.square().sum(-1))).mean()


def softened_divergence(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """T^2 KL(wanted || logits) of the softened distributions, mean over rows: (..., classes) twice -> ()"""
    return SoftenedDivergence.apply(logits.flatten(0, -2), wanted.flatten(0, -2), temperature)


class SoftenedDivergence(torch.autograd.Function):
    """The same with its gradient, T (softmax(a/T) - softmax(b/T)) / rows, made at once and a few rows at a time.

    Rows of 50,000 classes stay in the processor's cache so, and one tensor of the logits' size is kept instead of five: three
    times as fast as autograd's on a CPU.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
        total, slope = logits.new_zeros((), dtype=torch.float32), torch.empty_like(logits)
        for parts in zip(*(x.split(ROWS) for x in (logits, wanted, slope)), strict=True):
            a, b = (log_softmax(x.float() / temperature, -1) for x in parts[:2])
            likely = b.exp()
            total += torch.dot(likely.flatten(), (b - a).flatten())
            parts[2].copy_(a.exp_().sub_(likely))
        ctx.save_for_backward(slope)
        ctx.scale = temperature / len(logits)
        return total * (temperature**2 / len(logits))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, above: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return slope.mul_(above * ctx.scale), None, None


class Features:
    """Catches what blocks put out, apart for each thread."""

    def __init__(self, blocks: list[Block]) -> None:
        self.local, self.hooks = threading.local(), ExitStack()
        for block in blocks:
            self.hooks.callback(block.module.register_forward_hook(self.catch).remove)

    def catch(self, module: nn.Module, inputs: Any, output: Any) -> None:
        caught = getattr(self.local, "caught", None)
        if caught is not None:
            caught.append(output[0] if isinstance(output, tuple) else output)

    def of(self, run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The result of a forward, and the outputs of the blocks on the way."""
        self.local.caught = []
        output = run()
        caught, self.local.caught = self.local.caught, None
        return output, caught
