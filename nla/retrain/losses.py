"""The loss of a retraining: the model's own loss, and distillation terms that compare it with the dense model."""

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
from nla.machine.device import products_in
from nla.models.base import Model, Sample
from nla.retrain.settings import Retraining
from nla.statistics.blocks import Block, chain

ROWS = 16  # rows of logits that are compared at once


class Distillation:
    """loss + logits * T^2 KL(dense || compressed) + features * squared difference + perturbation * mean(max|W' - W|^2)

    `logits`, `features` and `perturbation` are weights from the settings. The temperature T divides the logits of both models
    (Hinton et al., 2015). The features are the outputs of the blocks, compared by `relative_difference`. The last summand is
    PELA's weight perturbation (Guo et al., 2023), averaged over matrices.

    Args:
        model, dense: the compressed model and the dense one. Both get hooks, which `close` removes.
        layers: qualified names of the compressed matrices.
    """

    def __init__(self, model: Model, dense: Model, layers: list[str], settings: Retraining) -> None:
        self.model, self.dense, self.settings = model, dense, settings
        self.compressed = {name: model.module.get_submodule(name) for name in layers}
        self.weights = {name: get_linear(dense.module, name).weight for name in layers}
        self.features = [Features(chain(m, layers)) if settings.features else None for m in (model, dense)]

    def __call__(self, sample: Sample) -> Tensor:
        with products_in(self.settings.products, sample.inputs.device):
            logits, seen = self.run(self.model, sample, self.features[0])
            if self.settings.compares:
                with torch.no_grad():
                    wanted, shown = self.run(self.dense, sample, self.features[1])
        loss = self.model.loss_of(logits, sample)
        if self.settings.logits:
            loss = loss + self.settings.logits * softened_divergence(logits, wanted, self.settings.temperature)
        if self.settings.features:
            parts = [relative_difference(a, b).to(loss.device) for a, b in zip(seen, shown, strict=True)]
            loss = loss + self.settings.features * torch.stack(parts).mean()
        if self.settings.perturbation:
            loss = loss + self.settings.perturbation * self.largest_changes(loss.device).square().mean()
        return loss

    def close(self) -> None:
        """Remove the hooks from both models."""
        for features in filter(None, self.features):
            features.hooks.close()

    @staticmethod
    def run(model: Model, sample: Sample, features: "Features | None") -> tuple[Tensor, list[Tensor]]:
        """The logits, and the outputs of the blocks if `features` records them."""
        if features is None:
            return model.logits(sample.inputs), []
        return features.of(lambda: model.logits(sample.inputs))

    def largest_changes(self, device: torch.device) -> Tensor:
        """max|W' - W| of each compressed matrix: (matrices,). A model may be spread over several GPUs."""
        return torch.stack(
            [
                (layer.term.dense() - self.weights[name]).abs().amax().float().to(device)
                for name, layer in self.compressed.items()
                if isinstance(layer, CompressedLinear)
            ]
        )


def relative_difference(features: Tensor, wanted: Tensor) -> Tensor:
    """2 |f - w|^2 / (|f|^2 + |w|^2), averaged over positions: (..., features) twice -> (), from 0 to 4.

    Each position is normalised separately. In models like LLaMA, the first token has features hundreds of times larger than
    the other tokens (massive activations, Sun et al., 2024), and would dominate a common sum. The norms of both models are in
    the divisor, because a compressed model may have such features where the dense model has none.
    """
    f, w = features.float(), wanted.float()
    return (2 * (f - w).square().sum(-1) / (f.square().sum(-1) + w.square().sum(-1))).mean()


def softened_divergence(logits: Tensor, wanted: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(wanted / T) || softmax(logits / T)), averaged over rows: (..., classes) twice -> (). T: temperature."""
    return SoftenedDivergence.apply(logits.flatten(0, -2), wanted.flatten(0, -2), temperature)


class SoftenedDivergence(torch.autograd.Function):
    """`softened_divergence` with the gradient T (softmax(a/T) - softmax(b/T)) / rows for the logits a and the wanted logits b.

    The forward pass computes both, ROWS rows at a time. Rows of 50,000 classes then stay in the processor's cache. One tensor
    of the logits' size is kept instead of five. On a CPU this is three times as fast as autograd.
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
    """Records the outputs of blocks, separately for each thread, with forward hooks."""

    def __init__(self, blocks: list[Block]) -> None:
        self.local, self.hooks = threading.local(), ExitStack()
        for block in blocks:
            self.hooks.callback(block.module.register_forward_hook(self.catch).remove)

    def catch(self, module: nn.Module, inputs: Any, output: Any) -> None:
        caught = getattr(self.local, "caught", None)
        if caught is not None:
            caught.append(output if isinstance(output, Tensor) else output[0])  # a tuple, or the output class of a whole model

    def of(self, run: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
        """The result of `run()`, and the outputs of the blocks that it called, in order."""
        self.local.caught = []
        output = run()
        caught, self.local.caught = self.local.caught, None
        return output, caught
