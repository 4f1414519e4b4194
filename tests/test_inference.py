"""Tests of layers for inference: they compute what the compressed layers compute, from numbers that are prepared once."""

import pytest
import torch
from torch import nn

import nla
from nla.codes.codebook import codebook_of
from nla.codes.grid_format import GridFormat
from nla.compressed.inference import PivotedLinear, SumLinear, ThinLinear, inference_layer, optimise_for_inference
from nla.compressed.int4 import Int4Linear
from nla.compressed.layer import CompressedLinear, ReconstructingLinear
from nla.compressed.surgery import copy_with_same_tensors, swap
from nla.kernels.linear import Linear
from nla.kernels.phase import Phase
from nla.kernels.piecewise import Piecewise
from nla.machine.errors import UserError
from nla.matrix.triplets import Triplets
from nla.models.select import linear_specs, select_linears
from nla.saved.convert import pivot
from nla.terms.base import Sum, Term
from nla.terms.coded import CodedTerm
from nla.terms.grid import Grid, grid
from nla.terms.grid_factors import GridFactors
from nla.terms.kernel_term import KernelTerm, nothing
from nla.terms.scaled import Scaled
from tests.conftest import make_model
from tests.test_int4 import FAST

THIN = {
    "linear": lambda m, n, g: term(Linear(), m, n, g),
    "piecewise": lambda m, n, g: term(Piecewise(r=2), m, n, g),
    "phase": lambda m, n, g: term(Phase(), m, n, g),
    "hybrid": lambda m, n, g: Sum([term(Linear(), m, n, g), term(Phase(), m, n, g)]),
    "scaled": lambda m, n, g: Sum([term(Linear(), m, n, g), scales(term(Phase(), m, n, g), g)]),
    "angles": lambda m, n, g: angles(m, n, g),
    "factors": lambda m, n, g: GridFactors(random_grid(5, m, g), random_grid(5, n, g)),
}


def term(kernel, m: int, n: int, generator: torch.Generator, h: int = 3) -> KernelTerm:
    return KernelTerm(kernel, kernel.random_start(m, n, h, kernel.r, generator))


def scales(inner: KernelTerm, generator: torch.Generator) -> Scaled:
    rows, columns = (torch.rand(k, generator=generator) + 0.5 for k in (inner.out_features, inner.in_features))
    return Scaled(inner, rows, columns)


def angles(m: int, n: int, generator: torch.Generator) -> CodedTerm:
    rows, columns = (torch.rand(k, generator=generator) + 0.5 for k in (m, n))
    return CodedTerm.of(Phase(), codebook_of("angle", 4), Phase().random_start(m, n, 5, 1, generator), rows, columns)


def random_grid(m: int, n: int, generator: torch.Generator) -> Grid:
    form = GridFormat(4, 32)
    codes, zeros = (torch.randint(16, (m, k), generator=generator) for k in (n, form.groups(n)))
    return grid(codes, zeros, torch.rand(zeros.shape, generator=generator) + 0.1, form).as_stored(torch.float32)


def exact(layer: CompressedLinear, x: torch.Tensor) -> torch.Tensor:
    """The layer's outputs in float64, from the numbers that it stores."""
    y = x.double() @ layer.term.as_stored(torch.float64).dense().T
    return (y if layer.bias is None else y + layer.bias.double()).detach()


def error(y: torch.Tensor, right: torch.Tensor) -> float:
    return float((y.detach().double() - right).norm() / right.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", THIN)
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_two_prepared_matrices_compute_the_terms_outputs(kind, dtype, biased):
    generator = torch.Generator().manual_seed(0)
    own = THIN[kind](96, 64, generator).as_stored(dtype)
    bias = nn.Parameter(torch.randn(96, generator=generator).to(dtype)) if biased else None
    x = torch.randn(2, 5, 64, generator=generator).to(dtype)
    before, after = CompressedLinear(own, bias), inference_layer(own, bias)
    right = exact(before, x)
    assert isinstance(after, ThinLinear) and after(x).dtype == dtype
    assert error(after(x), right) < max(3 * error(before(x), right), torch.finfo(dtype).eps)
    assert not any(p.requires_grad for p in after.parameters())


@pytest.mark.parametrize("shift", [0.0, 8.0])
def test_self_terms_that_cancel_survive_bf16(shift):
    """Points far from the origin have large self-terms, which the inner products cancel."""
    generator = torch.Generator().manual_seed(0)
    start = term(Piecewise(r=2), 96, 64, generator).triplets
    own = KernelTerm(Piecewise(r=2), Triplets(start.A + shift, start.B + shift, start.mu)).as_stored(torch.bfloat16)
    x = torch.randn(5, 64, generator=generator).bfloat16()
    right = exact(CompressedLinear(own, None), x)
    assert error(inference_layer(own, None)(x), right) < 0.01
    left, factor = own.kernel.factors(own.triplets)  # rounded as they are, they do lose it
    assert shift == 0 or error(x @ factor @ left.T, right) > 0.05


def test_factors_to_round_make_the_same_matrix_as_the_kernel(kernel):
    if not hasattr(kernel, "factors"):
        return
    own = term(kernel, 11, 7, torch.Generator().manual_seed(0)).as_stored(torch.float64)
    left, right = kernel.factors_to_round(own.triplets)
    torch.testing.assert_close(left @ right.T, kernel.dense(own.triplets), rtol=1e-9, atol=1e-9)
    assert left.shape[1] == right.shape[1] == kernel.columns(own.triplets.h, own.triplets.r)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_masked_triplets_are_left_out_and_16_bit_ranks_are_multiples_of_8(dtype):
    generator = torch.Generator().manual_seed(0)
    own = term(Phase(), 64, 64, generator, h=9).as_stored(dtype)
    with torch.no_grad():
        own.mu[::2] = 0
    layer = inference_layer(own, None)
    assert layer.first.shape == (8, 64) and layer.second.shape == (64, 8)  # 4 triplets of 2 columns
    own = term(Linear(), 64, 64, generator, h=3).as_stored(dtype)
    assert inference_layer(own, None).first.shape == ((3 if dtype == torch.float32 else 8) * own.triplets.r, 64)


def test_factors_with_as_many_numbers_as_the_matrix_become_the_matrix(kernel):
    generator = torch.Generator().manual_seed(0)
    own, x = term(kernel, 13, 9, generator, h=8), torch.randn(4, 9, generator=generator)
    layer = inference_layer(own, None)
    assert type(layer) is nn.Linear
    torch.testing.assert_close(layer(x), own(x), rtol=1e-3, atol=1e-3)


@FAST
@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_a_grid_with_thin_factors_beside_it_stays_a_grid_with_thin_factors(biased):
    generator = torch.Generator().manual_seed(0)
    own = Sum([random_grid(96, 64, generator), THIN["linear"](96, 64, generator)]).as_stored(torch.bfloat16)
    bias = nn.Parameter(torch.randn(96, generator=generator).bfloat16()) if biased else None
    x = torch.randn(2, 5, 64, generator=generator).bfloat16()
    before, after = CompressedLinear(own, bias), inference_layer(own, bias)
    assert isinstance(after, SumLinear) and [type(part) for part in after.layers] == [Int4Linear, ThinLinear]
    assert error(after(x), exact(before, x)) < 3 * torch.finfo(torch.bfloat16).eps
    with pytest.raises(UserError, match="for inference only"):
        after.state_dict()


def test_a_sum_with_a_part_that_would_be_dense_becomes_one_dense_matrix():
    generator = torch.Generator().manual_seed(0)
    own, x = Sum([random_grid(96, 64, generator), THIN["linear"](96, 64, generator)]), torch.randn(3, 64, generator=generator)
    layer = inference_layer(own, None)  # in fp32, codes are slow
    assert type(layer) is nn.Linear
    torch.testing.assert_close(layer(x), own(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("h, kind", [(14, ThinLinear), (15, nn.Linear)])
def test_factors_of_nearly_the_matrixs_size_are_multiplied_out(h, kind):
    own = term(Phase(), 64, 64, torch.Generator().manual_seed(0), h=h)  # 2 h columns of 128 numbers, against 4,096
    assert type(inference_layer(own, None)) is kind


def test_a_term_without_triplets_gives_zeros():
    assert not inference_layer(nothing(24, 16, torch.float32), None)(torch.randn(3, 16)).any()


@pytest.mark.parametrize("biased", [False, True], ids=["", "bias"])
def test_pivot_rows_stay_pivot_rows(biased):
    generator = torch.Generator().manual_seed(0)
    module = nn.Sequential(nn.Linear(64, 96, bias=biased))
    swap(module, {"0": term(Linear(), 96, 64, generator, h=20)})
    list(pivot(module))
    x = torch.randn(3, 64, generator=generator)
    before = module(x)
    optimise_for_inference(module)
    assert isinstance(module[0], PivotedLinear)
    torch.testing.assert_close(module(x), before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_opt", "tiny_swin"])
@pytest.mark.parametrize("kind", THIN)
def test_a_whole_model_computes_the_same_and_the_copy_leaves_it_as_it_is(tmp_path, name, kind):
    model, generator = make_model(name, tmp_path), torch.Generator().manual_seed(0)
    chosen = select_linears(linear_specs(model.module), r"layers\.", None)
    swap(model.module, {s.name: scaled(THIN[kind](s.out_features, s.in_features, generator)) for s in chosen})
    reads_text = model.reads == "text"
    x = torch.randint(256, (2, 9), generator=generator) if reads_text else torch.randn(2, 1, 16, 16, generator=generator)
    with torch.inference_mode():
        before = model.logits(x)
        fast = nla.optimise_for_inference(copy_with_same_tensors(model.module))
        assert any(isinstance(m, ThinLinear) for m in fast.modules())
        assert not any(isinstance(m, CompressedLinear) for m in fast.modules())
        after = type(model)(fast, model.tokenizer if reads_text else model.transform).logits(x)
        torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-4)
        assert torch.equal(model.logits(x), before)
    assert sum(isinstance(m, CompressedLinear) for m in model.module.modules()) == len(chosen)


def scaled(own: Term) -> Term:
    return own.scaled(0.02).as_stored(torch.float32)  # about the size of a model's weights


def test_what_was_optimised_is_not_saved_and_reconstructing_layers_stay(tmp_path):
    model, generator = make_model("tiny_llama", tmp_path), torch.Generator().manual_seed(0)
    names = ["model.layers.0.mlp.up_proj", "model.layers.1.mlp.up_proj"]
    swap(model.module, {name: term(Phase(), 80, 48, generator) for name in names})
    kept = model.module.get_submodule(names[1])
    model.module.set_submodule(names[1], ReconstructingLinear(kept.term, kept.bias))
    optimise_for_inference(model.module)
    assert isinstance(model.module.get_submodule(names[1]), ReconstructingLinear)
    with pytest.raises(UserError, match="for inference only, and it cannot be saved"):
        model.module.save_pretrained(tmp_path / "out")
