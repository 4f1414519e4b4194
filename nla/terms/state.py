"""Terms as plain values and tensors, and back."""

import importlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nla.kernels.base import Kernel
from nla.terms.base import Term


def pack(terms: Mapping[str, Term]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors by name, and JSON: all that `unpack` needs. A tensor that several terms share is there once."""
    tensors: dict[str, Tensor] = {}
    names: dict[int, str] = {}
    shared: dict[str, str] = {}
    for name, term in terms.items():
        for part, tensor in term.named_parameters():
            own = f"{name}/{part}"
            if id(tensor) in names:
                shared[own] = names[id(tensor)]
            else:
                names[id(tensor)] = own
                tensors[own] = tensor.detach()
    return tensors, {"terms": {name: term.config() for name, term in terms.items()}, "shared": shared}


def unpack(tensors: Mapping[str, Tensor], info: Mapping[str, Any]) -> dict[str, Term]:
    """The terms that were packed, bit for bit, on the tensors' device."""
    parameters = {name: nn.Parameter(tensor) for name, tensor in tensors.items()}
    terms = {}
    for name, config in info["terms"].items():
        term = empty_term(config)
        for part, _ in list(term.named_parameters()):
            own = f"{name}/{part}"
            module, _, attribute = part.rpartition(".")
            setattr(term.get_submodule(module), attribute, parameters[info["shared"].get(own, own)])
        terms[name] = term
    return terms


def empty_term(config: Mapping[str, Any]) -> Term:
    """A term of this configuration (see `Term.config`) without numbers.

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
    """The class of this package under a dotted name; nothing else is imported."""
    module, _, name = path.rpartition(".")
    found = getattr(importlib.import_module(module), name, None) if module.startswith("nla.") else None
    if not isinstance(found, type) or not issubclass(found, base):
        raise ValueError(f"{path} is no {base.__name__} of this package")
    return found
