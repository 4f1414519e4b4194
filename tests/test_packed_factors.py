"""Tests of linear factors that are stored in few bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nla.codes.grid_format import GridFormat
from nla.codes.rounding import rounded_to_nearest
from nla.matrix.objective import Norms
from nla.matrix.spectrum import balanced_factors
from nla.methods.packed_svd import PackedSVD
from nla.methods.svd_llm import SVDLLM
from nla.storage.base import Coded, Float
from nla.terms.state import empty_term, pack, unpack
from tests.samples import compress, correlated, normal


@pytest.mark.parametrize("width", [8, 4, 3, 2])
@settings(deadline=None, max_examples=30)
@given(m=st.integers(1, 300), n=st.integers(1, 300), per_weight=st.floats(0.5, 15))
def test_packed_factors_have_the_largest_rank_that_fits(width, m, n, per_weight):
    method, bits = PackedSVD(width), int(per_weight * m * n)
    term = method.plan([(m, n)], bits, torch.bfloat16)[0]
    rank = term.rank_bound()
    assert term.bits() <= bits and (rank == min(m, n) or method.bits_of(m, n, rank + 1, torch.bfloat16) > bits)
    assert (rank > 0) == (bits >= method.least_bits([(m, n)], torch.bfloat16))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(7, 11), (20, 12)])
def test_packed_factors_are_a_term_like_any_other(dtype, shape):
    weight = normal(*shape)
    term = compress(SVDLLM(False, 0.0, Coded("int", 4, 0)), weight, 6).term.as_stored(dtype)
    x = normal(2, 3, shape[1], seed=4).to(dtype)
    loose = {"rtol": 0.05, "atol": 0.1} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(term(x), x @ term.dense().T, **loose)
    restored = unpack(*pack({"w": term}))["w"]
    assert torch.equal(restored.dense(), term.dense()) and restored.config() == term.config()
    assert empty_term(term.config()).bits() == term.bits() == term.as_stored(torch.float32).bits()
    if dtype == torch.bfloat16:
        assert term.bits() == sum(8 * t.numel() * t.element_size() for t in term.state_dict().values())
    torch.testing.assert_close(term.scaled(4.0).dense(), 4 * term.dense())
    assert torch.linalg.matrix_rank(term.as_stored(torch.float64).dense()) <= term.rank_bound()


def test_gradients_of_packed_factors_are_those_of_their_matrix():
    term, x = compress(SVDLLM(False, 0.0, Coded("int", 4, 0)), normal(20, 12), 6).term, normal(5, 12, seed=1).requires_grad_()
    variables = [x, *term.parameters()]
    found = torch.autograd.grad(term(x).square().sum(), variables)
    wanted = torch.autograd.grad((x @ term.dense().T).square().sum(), variables)
    assert len(variables) == 3
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-4)


def test_four_bits_a_number_buy_svd_llm_more_rank_and_a_smaller_error():
    weight = normal(96, 128).to(torch.bfloat16)
    wide, packed_4 = (
        compress(SVDLLM(False, 0.0, Float()), weight, 4),
        compress(SVDLLM(False, 0.0, Coded("int", 4, 0)), weight, 4),
    )
    assert packed_4.term.rank_bound() > 3 * wide.term.rank_bound()
    assert packed_4.weighted_error < 0.5 * wide.weighted_error and packed_4.bits <= 4 * weight.numel()
    assert packed_4.weighted_error == pytest.approx(min(error for _, error in packed_4.losses), rel=0.02)


def test_error_feedback_makes_packed_factors_better_than_rounding_them():
    weight, statistics = normal(96, 128), correlated(128)
    fit = compress(SVDLLM(False, 0.0, Coded("int", 3, 0)), weight, 3, statistics)
    objective, form, rank = Norms(weight, statistics).outputs, GridFormat(3, 128), fit.term.rank_bound()
    left, right = (f.float().T.contiguous() for f in balanced_factors(objective.spectrum, rank))
    rounded = rounded_to_nearest(left, form).dense(form).T @ rounded_to_nearest(right, form).dense(form)
    plain = float(objective.squared(rounded - weight)[0]) / objective.energy
    assert fit.weighted_error < 0.7 * plain


@pytest.mark.parametrize("tokens", [3, 0])
def test_packed_factors_of_more_rank_than_the_weight_has_are_finite(tokens):
    weight = normal(24, 2) @ normal(2, 32, seed=1)
    fit = compress(SVDLLM(False, 0.0, Coded("int", 8, 0)), weight, 8, correlated(32, tokens))
    assert fit.term.is_finite() and fit.weighted_error < 1e-2
    assert compress(SVDLLM(False, 0.0, Coded("int", 8, 0)), 0 * weight, 8).status == "zero"
