"""Layers for inference only, in which all that does not depend on the input is computed once.

The layouts are the fastest of those measured with one row of 4096 x 11008 at 70 % on a CPU (one core of AMD Zen 5). In bf16,
(in, out) instead of (out, in) takes twice as long, and k = 895 instead of 896 takes 1.08 times as long. In fp32, the second
product takes 1.25 times as long from (out, k) as from (k, out). With 512 rows the layouts differ by a few percent.
"""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad

from nla.compressed.inference_linear import InferenceLinear
from nla.compressed.int4 import int4_linear, is_fast
from nla.compressed.layer import CompressedLinear
from nla.terms.base import Sum, Term
from nla.terms.grid import Grid
from nla.terms.pivoted import Pivoted

ALIGNED = 8  # the number of columns of 16-bit factors is a multiple of this, so that rows begin at multiples of 16 bytes
WORTH = 0.9  # of the matrix's numbers: with more, too few bytes are saved for the call of a second product (a chosen limit)


class ThinLinear(InferenceLinear):
    """y = (x first^T) second^T + bias, with first (k, in) and second (out, k)."""

    first: Tensor
    second: Tensor

    def forward(self, x: Tensor) -> Tensor:
        return linear(linear(x, self.first), self.second, self.bias)  # (..., in) -> (..., k) -> (..., out)


class PivotedLinear(InferenceLinear):
    """The layer of a `Pivoted` term: rows (R, in), coefficients (out - R, R), and the places (out,) of all rows."""

    rows: Tensor
    coefficients: Tensor
    places: Tensor

    def forward(self, x: Tensor) -> Tensor:
        pivot = linear(x, self.rows)  # (..., in) -> (..., R)
        y = torch.cat((pivot, linear(pivot, self.coefficients)), -1).index_select(-1, self.places)
        return y if self.bias is None else y + self.bias


class SumLinear(nn.Module):
    """The sum of the outputs of some layers."""

    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layers[0](x)
        for layer in self.layers[1:]:
            y = y + layer(x)
        return y


@torch.no_grad()
def optimise_for_inference(model: nn.Module) -> nn.Module:
    """Replace every CompressedLinear, in place, by a layer that computes the same outputs faster.

    That is codes of 4 bits (see `nla.compressed.int4`), or two thin matrices or pivot rows, or a sum of these, or the dense
    matrix if they have nearly as many numbers as it (see WORTH), or if the term has none of them. Outputs differ from the
    compressed layer's by rounding. The model can then neither be trained nor saved. It may need more memory than before: thin
    matrices are in the model's type, phase has two numbers for each stored angle, a dense matrix has all.

    Returns:
        the same model.
    """
    for name, layer in list(model.named_modules()):
        if type(layer) is CompressedLinear:  # a ReconstructingLinear was asked for
            model.set_submodule(name, inference_layer(layer.term, layer.bias))
    return model


def inference_layer(term: Term, bias: Tensor | None) -> nn.Module:
    """The layer for inference with the outputs of this term: codes, thin, pivoted, a sum of these, or dense."""
    dtype = next(term.parameters()).dtype
    term = term.as_stored(dtype)
    m, n = term.out_features, term.in_features
    if isinstance(term, Grid) and is_fast(term):
        return int4_linear(term, bias)
    if isinstance(term, Pivoted) and term.count() <= WORTH * m * n:
        rows, coefficients = term.rows.contiguous(), term.coefficients.contiguous()
        return PivotedLinear(bias, rows=rows, coefficients=coefficients, places=term.places())
    factors = term.wide_factors()
    if factors is None:
        return sum_or_dense(term, bias)
    left, right = factors
    if left.shape[1] * (m + n) > WORTH * m * n:
        return dense_layer((left.float() @ right.float().T).to(dtype), bias)
    first, second = (aligned(f.to(dtype)) for f in (right, left))
    return ThinLinear(bias, first=first.T.contiguous(), second=fast_for_one_row(second))


def sum_or_dense(term: Term, bias: Tensor | None) -> nn.Module:
    """The layer of a term that is no product of thin matrices as a whole, such as a grid and factors beside it."""
    if isinstance(term, Sum):
        first, *others = term.summands
        layers = [inference_layer(first, bias), *(inference_layer(other, None) for other in others)]
        if not any(isinstance(layer, nn.Linear) for layer in layers):
            return SumLinear(layers)
    return dense_layer(term.dense(), bias)


def aligned(factor: Tensor) -> Tensor:
    """The factor (features, k) with columns of zeros, so that rows of k 16-bit numbers begin at multiples of 16 bytes."""
    return pad(factor, (0, -factor.shape[1] % ALIGNED)) if factor.element_size() == 2 else factor


def fast_for_one_row(second: Tensor) -> Tensor:
    """The same (out, k) in the layout from which its product with one row is the fastest."""
    if second.dtype == torch.float32 and second.device.type == "cpu":
        return second.T.contiguous().T
    return second.contiguous()


def dense_layer(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """The linear layer of a matrix (out, in)."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    layer.load_state_dict({"weight": weight} | ({} if bias is None else {"bias": bias.detach()}), assign=True)
    return layer.requires_grad_(False)
