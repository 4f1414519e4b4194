"""The layers that replace a dense linear layer, one for each form of the forward pass."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from nla.terms.base import Term


class CompressedLinear(nn.Module):
    """y = x W'^T + bias, where W' is the matrix of a term and the bias is that of the dense layer.

    The forward pass is the term's own, from its triplets. Of the paper's kernel, that is algorithm 1, without the matrix W'.
    """

    def __init__(self, term: Term, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.term = term
        self.bias = bias

    def forward(self, x: Tensor) -> Tensor:
        y = self.term(x)  # (..., in) -> (..., out)
        return y if self.bias is None else y + self.bias

    @staticmethod
    def flops(term: Term, tokens: int) -> int:
        """Floating-point operations of a forward pass of `tokens` rows."""
        return term.forward_flops(tokens)

    @torch.no_grad()
    def dense(self) -> nn.Linear:
        """The dense layer with the same matrix, which is computed in fp32 and rounded once."""
        dtype = next(self.term.parameters()).dtype
        weight = self.term.as_stored(torch.promote_types(dtype, torch.float32)).dense().to(dtype)
        dense = nn.Linear(weight.shape[1], weight.shape[0], self.bias is not None, weight.device, weight.dtype)
        dense.weight.copy_(weight)
        if self.bias is not None:
            dense.bias.copy_(self.bias)
        return dense


class ReconstructingLinear(CompressedLinear):
    """The same layer, which computes the whole matrix W' in every forward pass: what the paper's algorithm 1 is compared with.

    Autograd keeps what it needs to differentiate W'. Of a kernel without thin factors, that is all out x in x h x r pairs.
    """

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):  # in W', terms of opposite sign cancel; see nla.kernels.precision
            weight = self.term.dense()
        return linear(x, weight, self.bias)

    @staticmethod
    def flops(term: Term, tokens: int) -> int:
        return term.dense_flops() + 2 * tokens * term.out_features * term.in_features


LAYERS = {"triplets": CompressedLinear, "reconstruct": ReconstructingLinear}  # by the setting `forward`
