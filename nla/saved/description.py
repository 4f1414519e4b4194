"""The description of a compressed model: plain values from which its layers are made again, empty, in the dense model."""

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import Tensor, nn

from nla.compressed.contents import matrix_terms
from nla.compressed.surgery import swap
from nla.machine.errors import UserError
from nla.terms.state import empty_term, pack

METHOD = "nla"  # the name of this format among transformers' storage formats
FORMAT = 1  # raised when a folder can no longer be read by older code
REMEDY = "this model is compressed: run `import nla` before from_pretrained"  # the name of a tensor, see guard()


class Entry(BaseModel):
    """A term, and the layers that have it."""

    layers: list[str] = Field(min_length=1)
    term: dict[str, Any]  # checked when the term is made


class Description(BaseModel):
    """What `describe` writes, beside the method and the format."""

    terms: list[Entry] = Field(min_length=1)
    shared: dict[str, str]


def describe(module: nn.Module) -> dict[str, Any]:
    """JSON values: under `terms` each different term with the names of its layers, since most layers of a kind have equal ones,
    and under `shared` the tensors that are stored under another name."""
    _, info = pack(matrix_terms(module))
    alike: dict[str, list[str]] = {}
    for name, config in info["terms"].items():
        alike.setdefault(json.dumps(config), []).append(name)
    return {
        "quant_method": METHOD,
        "format": FORMAT,
        "terms": [{"layers": names, "term": json.loads(config)} for config, names in alike.items()],
        "shared": {parameter_name(own): parameter_name(other) for own, other in info["shared"].items()},
    }


def parameter_name(packed: str) -> str:
    """The name in a model of a tensor that `pack` calls `<layer>/<part>`."""
    layer, part = packed.split("/")
    return f"{layer}.term.{part}"


def layers_of(description: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{name of a layer: configuration of its term}"""
    return {name: entry["term"] for entry in description["terms"] for name in entry["layers"]}


def check_description(description: Mapping[str, Any]) -> None:
    """Raise UserError unless this version can make the described layers."""
    if not isinstance(description, Mapping) or description.get("quant_method") != METHOD:
        raise UserError("the folder's config.json does not describe a compressed model of this project (quant_method: nla)")
    found = description.get("format")
    if found != FORMAT:
        raise UserError(
            f"the folder is of format {found}, and this version reads format {FORMAT}; use the version that wrote it"
        )
    try:
        Description.model_validate(description)
    except ValidationError as error:
        raise UserError(
            "the folder's config.json lacks terms of layers, or names of shared tensors; copy the whole folder again"
        ) from error


def put_empty_layers(module: nn.Module, description: Mapping[str, Any]) -> None:
    """Replace the described layers of a dense model by compressed ones without values, in place.

    Raises:
        UserError: a term or kernel is unknown to this version, or the model has no such layer.
    """
    layers = dict(module.named_modules())
    for name, config in layers_of(description).items():
        try:
            term = empty_term(config)
        except (ValueError, TypeError, KeyError, ImportError, AttributeError) as error:
            raise UserError(
                f"the folder's term of {name} is unknown to this version: {error}; use the one that wrote it"
            ) from error
        layer, shape = layers.get(name), (term.out_features, term.in_features)
        if not isinstance(layer, nn.Linear) or (layer.out_features, layer.in_features) != shape:
            raise UserError(f"the model has no linear layer {name} of {shape[0]}x{shape[1]}, which the folder describes")
        swap(module, {name: term})


def share(module: nn.Module, description: Mapping[str, Any]) -> None:
    """Make the tensors that are stored once the same object wherever they are used."""
    for own, other in description["shared"].items():
        holder, _, attribute = own.rpartition(".")
        there, _, name = other.rpartition(".")
        setattr(module.get_submodule(holder), attribute, getattr(module.get_submodule(there), name))


def stored_tensors(module: nn.Module, description: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state of the model, each shared tensor once, and the guard."""
    state = {name: tensor for name, tensor in module.state_dict().items() if name not in description["shared"]}
    return state | guard(description)


def guard(description: Mapping[str, Any]) -> dict[str, Tensor]:
    """Two tensors by which a folder fails to load where this project is not imported.

    transformers only warns about an unknown storage format, and would put random numbers into the compressed layers. A tensor
    with the name of a dense weight, but another shape, makes this an error. The name of the other one says what to do: it is
    in the report that transformers prints with the error.
    """
    nothing = torch.zeros(1, dtype=torch.uint8)
    return {f"{min(layers_of(description))}.weight": nothing, REMEDY: nothing.clone()}


def require_tensors(module: nn.Module, description: Mapping[str, Any], names: Iterable[str]) -> None:
    """Raise UserError if a tensor of a compressed layer is not among `names`, those in the folder's files."""
    there = set(names) | set(description["shared"])
    for name in layers_of(description):
        for part in module.get_submodule(name).state_dict():
            if f"{name}.{part}" not in there:
                raise UserError(f"the folder's files lack the tensor {name}.{part}; copy the whole folder again")
