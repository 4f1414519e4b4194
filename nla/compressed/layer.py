"""The layer that stands in for a dense linear layer."""

import torch
from torch import Tensor, nn

from nla.kernels.base import Kernel
from nla.matrix.triplets import Triplets


class Term(nn.Module):
    """One kernel over its own triplets, as trainable parameters."""

    def __init__(self, kernel: Kernel, triplets: Triplets) -> None:
        super().__init__()
        self.kernel = kernel
        self.hold(triplets)

    def hold(self, triplets: Triplets) -> None:
        """Take these triplets in place of those before."""
        self.A, self.B, self.mu = (nn.Parameter(p.detach()) for p in triplets.parts)

    @property
    def triplets(self) -> Triplets:
        return Triplets(self.A, self.B, self.mu)

    def forward(self, x: Tensor) -> Tensor:
        return self.kernel.apply(self.triplets, x)  # (..., in) -> (..., out)

    def dense(self) -> Tensor:
        return self.kernel.dense(self.triplets)  # (out, in)

    def extra_repr(self) -> str:
        return f"{self.kernel.name}, h={self.triplets.h}, r={self.triplets.r}"


class CompressedLinear(nn.Module):
    """y = sum over terms of x W'^T, plus the dense layer's bias."""

    def __init__(self, terms: tuple[tuple[Kernel, Triplets], ...], bias: Tensor | None) -> None:
        super().__init__()
        self.terms = nn.ModuleList(Term(kernel, triplets) for kernel, triplets in terms)
        self.bias = None if bias is None else nn.Parameter(bias)

    def parts(self) -> list[Term]:
        return [term for term in self.terms if isinstance(term, Term)]

    def forward(self, x: Tensor) -> Tensor:
        y = self.terms[0](x)
        for term in self.terms[1:]:
            y = y + term(x)
        return y if self.bias is None else y + self.bias

    @torch.no_grad()
    def dense(self) -> nn.Linear:
        """The dense layer with the same matrix."""
        weight = torch.stack([term.dense() for term in self.parts()]).sum(0)
        linear = nn.Linear(weight.shape[1], weight.shape[0], self.bias is not None, weight.device, weight.dtype)
        linear.weight.copy_(weight)
        if self.bias is not None:
            linear.bias.copy_(self.bias)
        return linear

    def count(self) -> int:
        """Parameters of the triplets with mu != 0; the bias is as in the dense layer and not counted."""
        return sum(term.triplets.count() for term in self.parts())
