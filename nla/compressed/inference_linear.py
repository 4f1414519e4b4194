"""The base of layers for inference only."""

from typing import Any

from torch import Tensor, nn

from nla.machine.errors import UserError


class InferenceLinear(nn.Module):
    """A linear layer that only computes outputs. It is not trained, and not saved: its numbers are not those of its term.

    Args:
        bias: (out,), or None.
        tensors: attributes by name, for the forward pass.
    """

    def __init__(self, bias: Tensor | None, **tensors: Tensor) -> None:
        super().__init__()
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.register_state_dict_pre_hook(refuse)


def refuse(module: nn.Module, *_: Any) -> None:
    """Raise UserError, because the model cannot be saved."""
    raise UserError(
        "optimise_for_inference has changed this model for inference only, and it cannot be saved; "
        "save it before, or copy the folder it was loaded from"
    )
