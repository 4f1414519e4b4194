"""Tests of grids for inference, whose matrix stays in codes of 4 bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nla.codes.grid_format import GridFormat
from nla.compressed import int4
from nla.compressed.inference import inference_layer
from nla.compressed.int4 import Int4Linear, int4_linear
from nla.terms.grid import Grid, grid
from tasks.base import resident_bytes

FAST = pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() != "AVX512", reason="the product is slow on this CPU")


def some(m: int, n: int, form: GridFormat, seed: int = 0, dtype: torch.dtype = torch.bfloat16) -> Grid:
    """A stored grid of random codes, zero points and scales."""
    generator = torch.Generator().manual_seed(seed)
    codes, zeros = (torch.randint(2**form.width, (m, k), generator=generator) for k in (n, form.groups(n)))
    return grid(codes, zeros, torch.rand(zeros.shape, generator=generator) + 0.1, form).as_stored(dtype)


@settings(deadline=None)
@given(
    st.integers(1, 70), st.integers(1, 300), st.sampled_from([1, 2, 3, 4]), st.sampled_from([32, 64, 128, 300]), st.booleans()
)
def test_codes_of_four_bits_compute_the_outputs_of_a_grid_of_any_shape_width_and_group(m, n, width, group, biased):
    term = some(m, n, GridFormat(width, min(group, n)), m)
    generator = torch.Generator().manual_seed(n)
    bias = torch.randn(m, generator=generator).bfloat16() if biased else None
    x = torch.randn(2, 3, n, generator=generator).bfloat16()
    layer = int4_linear(term, bias)
    own = x.double() @ term.as_stored(torch.float64).dense().T
    y = layer(x)
    assert y.dtype == torch.bfloat16 and y.shape == own.shape
    sizes = x.double().abs() @ term.as_stored(torch.float64).dense().abs().T + 2**width * x.double().abs().sum(-1, keepdim=True)
    added = own if bias is None else own + bias.double()
    rounding = 2**-8 * (own.abs() + added.abs()) + (2**-8 if width == 4 else 1e-5) * sizes  # shifts are exact up to 3 bits
    assert ((y.double() - added).abs() <= rounding).all()


@FAST
@pytest.mark.parametrize("group, bits", [(64, 4.5), (128, 4.25), (512, 4.125)])
def test_a_grid_of_two_bits_takes_a_little_more_than_four_in_a_model_for_inference(group, bits):
    layer = inference_layer(some(96, 512, GridFormat(2, group)), None)
    assert isinstance(layer, Int4Linear) and 8 * resident_bytes(layer) == bits * 96 * 512


@FAST
@pytest.mark.parametrize(
    "form, dtype",
    [
        (GridFormat(8, 64), torch.bfloat16),
        (GridFormat(4, 64, "nf4"), torch.bfloat16),
        (GridFormat(2, 48), torch.bfloat16),
        (GridFormat(2, 64), torch.float32),
    ],
    ids=str,
)
def test_what_the_product_cannot_read_or_would_compute_slowly_becomes_dense(form, dtype):
    term = some(20, 192, form, dtype=dtype)
    layer, x = inference_layer(term, None), torch.randn(3, 192, dtype=dtype)
    assert type(layer) is nn.Linear
    torch.testing.assert_close(layer(x), term(x))


def test_on_another_processor_a_grid_becomes_dense(monkeypatch):
    monkeypatch.setattr(int4.torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    assert type(inference_layer(some(16, 64, GridFormat(2, 64)), None)) is nn.Linear
