"""Tests of packed codes, of grids as terms, and of rounding with and without error feedback."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nla.codes.feedback import BLOCK, Hessian, blocks, feedback, gptq, static_groups
from nla.codes.grid_format import WIDTHS, GridFormat, formats, largest, least_grid_bits
from nla.codes.levels import NormalFloat
from nla.codes.packed import packed, packed_width, unpacked
from nla.codes.rounding import best_scaling, rounded_to_nearest
from nla.terms import grid as grid_module
from nla.terms.grid import Grid, grid_of
from nla.terms.state import empty_term, pack, unpack
from tests.samples import normal

FORMS = [GridFormat(width, group) for width in WIDTHS for group in (4, 5, 11)] + [GridFormat(4, 4, "nf4")]
SHAPES = [(7, 11), (1, 1), (16, 24)]


def term_of(form: GridFormat, m: int, n: int, dtype: torch.dtype = torch.float32) -> Grid:
    """A stored grid near a random matrix."""
    form = GridFormat(form.width, min(form.group, n), form.kind)
    return grid_of(rounded_to_nearest(normal(m, n), form), form).as_stored(dtype)


def correlated(n: int, tokens: int = 0) -> torch.Tensor:
    """A Gram matrix of correlated inputs of different sizes, fp64."""
    x = normal(tokens or 4 * n, n, seed=1).double() * torch.linspace(0.1, 2, n) + 2 * normal(tokens or 4 * n, 1, seed=2)
    return x.T @ x


@settings(deadline=None)
@given(st.integers(1, 8), st.integers(1, 5), st.integers(1, 40), st.integers(0, 9))
def test_packed_codes_are_unpacked_unchanged_and_take_their_bits(bits, rows, n, seed):
    codes = torch.randint(0, 2**bits, (rows, n), generator=torch.Generator().manual_seed(seed))
    held = packed(codes, bits)
    assert held.dtype == torch.uint8 and held.shape == (rows, packed_width(n, bits))
    assert 8 * held.shape[1] < bits * (n + 8)
    assert torch.equal(unpacked(held, bits, n), codes.to(torch.uint8))


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("panel", [2**19, 25])
def test_the_forward_pass_of_a_grid_is_a_product_with_its_dense_matrix(form, shape, dtype, panel, monkeypatch):
    monkeypatch.setattr(grid_module, "PANEL", panel)
    term = term_of(form, *shape, dtype)
    x = normal(2, 3, shape[1], seed=1).to(dtype)
    assert term.dense().dtype == dtype and term(x).dtype == dtype
    torch.testing.assert_close(term(x), x @ term.dense().T)
    with torch.no_grad():
        torch.testing.assert_close(term(x), x @ term.dense().T)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_gradients_of_a_grid_are_those_of_its_dense_matrix(form, monkeypatch):
    monkeypatch.setattr(grid_module, "PANEL", 30)
    term, x, y = term_of(form, 7, 11), normal(5, 11, seed=1).requires_grad_(), normal(5, 7, seed=2)
    found = torch.autograd.grad((term(x) * y).sum(), [x, term.scales])
    wanted = torch.autograd.grad((x @ term.dense().T * y).sum(), [x, term.scales])
    for got, want in zip(found, wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_bits_of_a_grid_are_those_of_its_state_dict_in_a_model_of_16_bits(form, shape):
    term = term_of(form, *shape, torch.bfloat16)
    assert term.bits() == sum(8 * t.numel() * t.element_size() for t in term.state_dict().values())
    assert term.bits() == term.form.bits(*shape) == term.as_stored(torch.float32).bits()
    assert empty_term(term.config()).bits() == term.bits() and term.count() >= shape[0] * shape[1]
    wide = term_of(form, *shape).scales
    assert torch.equal(wide.to(torch.bfloat16).float(), wide)  # so 16 bits hold them


def test_scales_that_training_made_more_precise_count_in_their_own_type():
    term = term_of(GridFormat(4, 4), 7, 11)
    before = term.bits()
    term.scales.data *= 1.001
    assert term.bits() - before == 16 * term.scales.numel() and term.as_stored(torch.float32).bits() == before


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_grid_is_the_same_matrix_in_every_type_and_after_saving(form):
    term = term_of(form, 7, 11, torch.bfloat16)
    wide = term.as_stored(torch.float32)
    assert torch.equal(wide.as_stored(torch.bfloat16).dense(), term.dense())
    assert torch.equal(wide.as_stored(torch.float32).dense(), wide.dense())
    assert torch.equal(wide.scaled(0.25).dense(), wide.dense() / 4)
    restored = unpack(*pack({"w": term}))["w"]
    assert restored.config() == term.config() and torch.equal(restored.dense(), term.dense())


def test_the_nf4_table_is_the_published_one():
    table = NormalFloat().table
    assert len(table) == 16 and table[7] == 0 and table[0] == -1 and table[15] == 1
    torch.testing.assert_close(table[[1, 6, 8, 14]], torch.tensor([-0.6961928, -0.0910500, 0.0795803, 0.7229568]))


@pytest.mark.parametrize("width, best", [(1, 0.3634), (2, 0.1188), (3, 0.0374), (4, 0.01154)])
def test_a_gaussian_source_is_rounded_nearly_as_well_as_by_the_best_uniform_quantiser(width, best):
    """The best errors are those of Max (1960), table II."""
    weight, form = normal(4, 20000), GridFormat(width, 20000)
    error = (rounded_to_nearest(weight, form).dense(form) - weight).square().mean() / weight.square().mean()
    assert best * 0.98 < float(error) < best * 1.02


def test_important_inputs_get_a_smaller_error():
    weight, form = normal(64, 32), GridFormat(2, 32)
    importance = torch.tensor([100.0, 1.0]).repeat_interleave(16)
    errors = {
        name: (rounded_to_nearest(weight, form, counts).dense(form) - weight).square().mean(0)
        for name, counts in (("alike", None), ("important", importance))
    }
    assert errors["important"][:16].sum() < errors["alike"][:16].sum()
    assert (errors["important"] * importance).sum() < (errors["alike"] * importance).sum()


@settings(deadline=None)
@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.5, 9))
def test_the_chosen_width_and_group_never_exceed_the_bits(m, n, per_weight):
    bits = int(per_weight * m * n)
    found = largest(formats(n), m, n, bits)
    sizes = [form.bits(m, n) for form in formats(n) if form.bits(m, n) <= bits]
    assert found.bits(m, n) == max(sizes) if found else not sizes
    assert least_grid_bits(m, n) == min(form.bits(m, n) for form in formats(n))


def test_two_bits_in_groups_of_64_take_2_28_bits_a_weight():
    assert largest(formats(576), 576, 576, int(2.2813 * 576 * 576)) == GridFormat(2, 64)
    assert GridFormat(2, 64).bits(576, 576) / 576**2 == 2 + 18 / 64


@pytest.mark.parametrize("form", [GridFormat(2, 32), GridFormat(3, 96), GridFormat(4, 32, "nf4")], ids=str)
def test_gptq_with_a_multiple_of_the_identity_is_round_to_nearest(form):
    weight = normal(16, 96)
    hessian = Hessian(3.7 * torch.eye(96, dtype=torch.float64))
    found, nearest = gptq(weight, hessian, form), rounded_to_nearest(weight, form)
    assert torch.equal(found.codes, nearest.codes) and torch.equal(found.scaling.scales, nearest.scaling.scales)
    order = torch.randperm(96, generator=torch.Generator().manual_seed(0))
    fed = static_groups(weight, form, nearest.scaling, order, hessian.own)
    assert torch.equal(fed.codes, nearest.codes)


@pytest.mark.parametrize("tokens", [400, 50])
@pytest.mark.parametrize("form", [GridFormat(2, 32), GridFormat(2, 50), GridFormat(3, 130), GridFormat(2, 300)], ids=str)
def test_gptq_has_a_much_smaller_weighted_error_than_round_to_nearest(form, tokens):
    weight, hessian = normal(24, 300), Hessian(correlated(300, tokens))
    found, nearest = (
        hessian.errors(weight - r.dense(form)) for r in (gptq(weight, hessian, form), rounded_to_nearest(weight, form))
    )
    assert found.sum() < 0.6 * nearest.sum()


def test_feedback_is_the_factor_of_the_inverse_of_the_damped_hessian():
    gram = correlated(20)
    U = feedback(gram)
    damped = gram + 0.01 * gram.diagonal().mean() * torch.eye(20, dtype=torch.float64)
    torch.testing.assert_close(U.T @ U @ damped, torch.eye(20, dtype=torch.float64), rtol=1e-9, atol=1e-9)
    assert torch.equal(U, U.triu())


def test_feedback_in_blocks_is_feedback_input_by_input(monkeypatch):
    weight, U, form = normal(8, 300), feedback(correlated(300)).float(), GridFormat(4, 32)
    scaling, order = best_scaling(weight, form), torch.arange(300)
    found = static_groups(weight, form, scaling, order, U)
    monkeypatch.setattr("nla.codes.feedback.BLOCK", 1)
    assert (static_groups(weight, form, scaling, order, U).codes == found.codes).float().mean() > 0.99


@settings(deadline=None)
@given(st.integers(1, 600), st.integers(1, 600))
def test_blocks_cover_all_inputs_and_end_where_groups_end(n, group):
    found = list(blocks(n, group))
    assert [i for b in found for i in range(b.start, b.stop)] == list(range(n))
    assert all(b.stop - b.start <= BLOCK and b.start // group == (b.stop - 1) // group for b in found)


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_zero_weights_and_grams_are_rounded_to_finite_numbers(form):
    weight = normal(6, 11)
    weight[2], weight[:, 3] = 0, 0
    for gram in (torch.zeros(11, 11), torch.diag(torch.tensor([1.0] + [0.0] * 10)), correlated(11, 2)):
        found = gptq(weight, Hessian(gram.double()), form).dense(form)
        assert found.isfinite().all() and not found[2].any()
    assert not gptq(0 * weight, Hessian(correlated(11)), form).dense(form).any()
