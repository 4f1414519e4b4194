"""Replace layers of a model by their qualified names."""

from collections.abc import Mapping

from torch import nn

from nla.compressed.layer import CompressedLinear
from nla.methods.base import Fit


def swap(model: nn.Module, fits: Mapping[str, Fit]) -> None:
    """Put a CompressedLinear in the place of every dense linear layer that has a fit."""
    for name, fit in fits.items():
        dense = get_linear(model, name)
        layer = CompressedLinear(fit.terms, dense.bias).to(dense.weight.device)
        model.set_submodule(name, layer.requires_grad_(dense.weight.requires_grad))


def merge(model: nn.Module) -> None:
    """Put the dense layer of the same matrix in the place of every CompressedLinear."""
    for name, module in list(model.named_modules()):
        if isinstance(module, CompressedLinear):
            model.set_submodule(name, module.dense())


def get_linear(model: nn.Module, name: str) -> nn.Linear:
    """The dense linear layer of this name."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module


def count(model: nn.Module) -> int:
    """Parameters of a model as counted everywhere: tied ones once, of triplets those with mu != 0."""
    layers = [m for m in model.modules() if isinstance(m, CompressedLinear)]
    stored = sum(p.numel() for layer in layers for p in layer.terms.parameters())
    return sum(p.numel() for p in model.parameters()) - stored + sum(layer.count() for layer in layers)
