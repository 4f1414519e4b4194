"""The layer that replaces a dense linear layer."""

import torch
from torch import Tensor, nn

from nla.terms.base import Term


class CompressedLinear(nn.Module):
    """y = x W'^T + bias, where W' is the matrix of a term and the bias is that of the dense layer."""

    def __init__(self, term: Term, bias: Tensor | None) -> None:
        super().__init__()
        self.term = term
        self.bias = None if bias is None else nn.Parameter(bias)

    def forward(self, x: Tensor) -> Tensor:
        y = self.term(x)  # (..., in) -> (..., out)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def dense(self) -> nn.Linear:
        """The dense layer with the same matrix."""
        weight = self.term.dense()
        linear = nn.Linear(weight.shape[1], weight.shape[0], self.bias is not None, weight.device, weight.dtype)
        linear.weight.copy_(weight)
        if self.bias is not None:
            linear.bias.copy_(self.bias)
        return linear
