"""Whether weights fit a model, and whether they are finite: the rules for every kind of model."""

import re
from collections.abc import Sequence

import torch
from torch import Size, Tensor, nn

from nla.machine.device import type_name
from nla.machine.errors import NonFiniteError, UserError

NAMED = 3  # names that a message shows
LEFT_OVER = re.compile(r"\.(masked_bias|version)$")  # constants that older versions of transformers stored beside weights
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def require_fit(
    source: str, missing: Sequence[str], unknown: Sequence[str], misshapen: Sequence[tuple[str, Size, Size]], remedy: str = ""
) -> None:
    """Raise UserError, which counts and names them, if weights and model do not have the same tensors.

    Args:
        source: the file or folder with the weights.
        missing: names of tensors of the model that the source lacks.
        unknown: names of tensors of the source that the model lacks.
        misshapen: (name, shape in the source, shape in the model).
        remedy: what to do, for the message.
    """
    unknown = [name for name in unknown if not LEFT_OVER.search(name)]
    shapes = [f"{name} ({shape(there)} in the file, {shape(here)} in the model)" for name, there, here in misshapen]
    faults = [
        f"they lack {told(missing, 'of the model')}" if missing else "",
        f"they have {told(unknown, 'that the model does not have')}" if unknown else "",
        f"{told(shapes, 'of other shapes')}" if shapes else "",
    ]
    if any(faults):
        remedy = remedy or "give the weights and the config.json that belong together"
        raise UserError(f"the weights in {source} do not fit the model: {', and '.join(filter(None, faults))}; {remedy}")


def told(names: Sequence[str], which: str) -> str:
    """A count and the first names: `9 tensors of the model, such as a, b, c`."""
    return f"{len(names)} tensor{'s' * (len(names) != 1)} {which}, such as {', '.join(names[:NAMED])}"


def shape(size: Size) -> str:
    """A shape for messages, such as `49x2`."""
    return "x".join(map(str, size)) or "a number"


def require_numbers(source: str, tensors: dict[str, Tensor]) -> None:
    """Raise UserError if a weight is not stored as floating-point numbers of 16 bits or more, but for example in int8."""
    odd = [f"{name} ({type_name(t)})" for name, t in tensors.items() if name.endswith("weight") and t.dtype not in FLOATS]
    if odd:
        raise UserError(
            f"the weights in {source} are quantised: {told(odd, 'of other types than floats')}; give them in full precision"
        )


def require_finite(module: nn.Module, remedy: str) -> None:
    """Raise NonFiniteError, which names the tensor, if a parameter or buffer has NaN or infinite values."""
    for name, tensor in (*module.named_parameters(), *module.named_buffers()):
        # in one pass, and without a copy: the smallest and the largest number are NaN if any number is
        if tensor.is_floating_point() and tensor.numel() and not all(bool(v.isfinite()) for v in tensor.detach().aminmax()):
            raise NonFiniteError(f"{name} of the model holds NaN or infinite values in {type_name(tensor)}; {remedy}")
