"""Replacement of a model's layers by qualified name."""

from collections.abc import Mapping
from copy import deepcopy
from typing import TypeVar

from torch import nn

from nla.compressed.layer import LAYERS, CompressedLinear
from nla.terms.base import Term

Module = TypeVar("Module", bound=nn.Module)


def swap(model: nn.Module, terms: Mapping[str, Term]) -> None:
    """Replace each named dense linear layer by a CompressedLinear of its term, which must be on the same device."""
    for name, term in terms.items():
        dense = get_linear(model, name)
        layer = CompressedLinear(term, dense.bias)
        model.set_submodule(name, layer.requires_grad_(dense.weight.requires_grad))


def set_form(model: nn.Module, form: str) -> None:
    """Give every CompressedLinear this form of the forward pass, a key of `nla.compressed.layer.LAYERS`."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, CompressedLinear):
            model.set_submodule(name, LAYERS[form](layer.term, layer.bias))


def merge(model: nn.Module) -> None:
    """Replace every CompressedLinear by the dense layer of the same matrix."""
    for name, module in list(model.named_modules()):
        if isinstance(module, CompressedLinear):
            model.set_submodule(name, module.dense())


def copy_with_same_tensors(model: Module) -> Module:
    """A copy whose parameters and buffers are the same objects, so that layers can be replaced in the copy only."""
    return deepcopy(model, {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())})


def get_linear(model: nn.Module, name: str) -> nn.Linear:
    """The dense linear layer with this qualified name."""
    module = model.get_submodule(name)
    assert isinstance(module, nn.Linear)
    return module
