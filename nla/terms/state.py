"""Conversion of terms to tensors and JSON values, and back."""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nla.kernels.base import Kernel
from nla.terms.base import Term


def pack(terms: Mapping[str, Term]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and JSON values, from which `unpack` restores the terms. A shared tensor is stored once."""
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, term in terms.items():
        for part, tensor in term.state_dict(keep_vars=True).items():
            own = f"{name}/{part}"
            if id(tensor) in names:
                shared[own] = names[id(tensor)]
            else:
                names[id(tensor)] = own
                tensors[own] = tensor.detach()
    return tensors, {"terms": {name: term.config() for name, term in terms.items()}, "shared": shared}


def unpack(tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> dict[str, Term]:
    """The terms that `pack` stored, bit for bit, on the device of the tensors."""
    held = {name: nn.Parameter(t) if t.is_floating_point() else t for name, t in tensors.items()}
    terms = {}
    for name, config in info["terms"].items():
        term = empty_term(config)
        for part in list(term.state_dict()):
            own = f"{name}/{part}"
            module, _, attribute = part.rpartition(".")
            setattr(term.get_submodule(module), attribute, held[info["shared"].get(own, own)])
        terms[name] = term
    return terms


def empty_term(config: Mapping[str, Any]) -> Term:
    """A term of this configuration (see `Term.config`) without values.

    Raises:
        ValueError: `class` names no term or kernel of this package.
    """
    settings = dict(config)
    kind = named_class(settings.pop("class"), Term)
    if "terms" in settings:
        settings["terms"] = [empty_term(term) for term in settings["terms"]]
    if "kernel" in settings:
        arguments = dict(settings["kernel"])
        settings["kernel"] = named_class(arguments.pop("class"), Kernel)(**arguments)
    if "dtype" in settings:
        settings["dtype"] = getattr(torch, settings["dtype"])
    return kind.empty(**settings)


def named_class(path: str, base: type) -> Any:
    """The class with this dotted name, a subclass of `base`. Only modules of this package are imported.

    Raises:
        ValueError: the name is not that of such a class.
    """
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name, None) if module.startswith("nla.") else None
    if not isinstance(found, type) or not issubclass(found, base):
        raise ValueError(f"{path} is no {base.__name__} of this package")
    return found
