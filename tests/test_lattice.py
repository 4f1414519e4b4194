"""Tests of QuIP#: random Hadamard transforms, lattice codebooks, rounding with feedback, the term and the method."""

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nla.codes import block_ldlq as block_ldlq_module
from nla.codes.block_ldlq import RoundedToLattice, block_ldlq, feedback, rounded_at, swept
from nla.codes.damped import damped
from nla.codes.hadamard import random_signs, rotated, rotated_back
from nla.codes.lattice_format import ONE, TWO, WIDTHS, RowFormat, VectorFormat
from nla.machine.errors import UserError
from nla.matrix.inputs import Statistics
from nla.methods.quip import QuIP
from nla.terms.lattice_term import LatticeTerm, lattice_bits
from nla.terms.state import empty_term, pack, unpack
from tests.conftest import TINY
from tests.samples import compress, correlated, normal

SIGNS_OF_SEED_7 = [1, -1, 1, -1, 1, 1, 1, 1, -1, 1, -1, 1]


def random_codes(rows: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (rows, size), generator=torch.Generator().manual_seed(seed)).to(torch.uint8)


def random_term(m: int, n: int, width: float, seed: int = 0) -> LatticeTerm:
    codes = random_codes(m, int(width * -(-n // 8)), seed)
    return LatticeTerm(codes, torch.tensor(0.3), torch.tensor(12345 + seed), n)


@settings(deadline=None, max_examples=30)
@given(st.one_of(st.integers(1, 40), st.sampled_from([192, 576, 1536])), st.integers(0, 2**62))
def test_the_random_hadamard_transform_is_orthogonal_at_any_size(n, seed):
    (signs,) = random_signs(seed, n)
    V = rotated(torch.eye(n), signs).T.double()  # computed in fp32
    torch.testing.assert_close(V @ V.T, torch.eye(n).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(rotated_back(torch.eye(n), signs).double(), V, rtol=0, atol=1e-6)
    x = normal(3, n, seed=1)
    torch.testing.assert_close(rotated_back(rotated(x, signs), signs), x, rtol=1e-5, atol=1e-5)


def test_a_rotation_spreads_an_outlier_over_all_numbers_of_a_vector():
    (signs,) = random_signs(0, 576)  # 64 * 9
    spread = rotated(torch.eye(576)[37:38], signs).abs()
    assert float(spread.max()) <= 2**0.5 / 24 + 1e-6 and int((spread > 1e-3).sum()) >= 512


def test_signs_of_a_seed_are_the_same_on_every_machine():
    first, second = random_signs(7, 4, 8)
    assert first.tolist() == SIGNS_OF_SEED_7[:4] and second.tolist() == SIGNS_OF_SEED_7[4:]


@pytest.mark.parametrize("codebook", [TWO, ONE], ids=["2 bits", "1 bit"])
@pytest.mark.parametrize("size", [0.3, 1.0, 3.0])
def test_the_nearest_entry_is_that_of_a_comparison_with_all_entries(codebook, size):
    x, entries = size * normal(200, 8, seed=3), codebook.entries
    found = (x - entries[codebook.nearest(x)]).double().square().sum(1)
    least = torch.cdist(x.double(), entries.double()).square().amin(1)
    torch.testing.assert_close(found, least, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("codebook, shift, count", [(TWO, 0.25, 2**16), (ONE, 0.0, 2**8)])
def test_entries_are_distinct_points_of_e8_and_each_is_its_own_nearest(codebook, shift, count):
    entries = codebook.entries
    assert len(entries) == len(entries.unique(dim=0)) == count
    points = entries - shift  # E8: all whole numbers or all whole numbers plus 1/2, with an even sum
    assert (((points % 1) == (points[:, :1] % 1)) & ((2 * points) % 1 == 0)).all() and (points.sum(1) % 2 == 0).all()
    some = torch.arange(0, count, 37)
    assert torch.equal(codebook.nearest(entries[some]), some)


def test_e8p_has_the_227_patterns_of_norm_10_at_most_and_29_of_norm_12():
    norms = TWO.patterns.square().sum(1)
    assert len(TWO.patterns.unique(dim=0)) == 256 and int((norms <= 10).sum()) == 227 and int((norms == 12).sum()) == 29


@pytest.mark.parametrize("width", WIDTHS)
def test_a_gaussian_source_has_its_known_error_below_that_of_scalar_codes(width):
    form, x = VectorFormat(width), normal(20_000, 8, seed=4)
    codes = form.nearest(x)
    error = float((form.values(codes) - x).square().mean())
    assert codes.shape == (20_000, width) and codes.dtype == torch.uint8
    assert error == pytest.approx({1: 0.3186, 2: 0.0913, 3: 0.0295, 4: 0.0083}[width], rel=0.02)
    assert error < {1: 0.3634, 2: 0.1175, 3: 0.03454, 4: 0.009497}[width]  # Lloyd-Max (Max, 1960)


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(0, 36))
def test_a_row_has_any_number_of_bytes_and_its_last_vectors_take_one_more_than_the_first(vectors, size):
    form = RowFormat(vectors, min(size, 4 * vectors))
    places = [form.vector(k) for k in range(vectors)]
    widths = [vector.width for vector, _ in places]
    assert widths == sorted(widths) and widths[-1] - widths[0] <= 1
    assert [byte for _, place in places for byte in range(place.start, place.stop)] == list(range(form.size))
    codes = random_codes(3, form.size)
    one_by_one = torch.cat([vector.values(codes[:, place]) for vector, place in places], 1)
    assert torch.equal(form.values(codes), one_by_one) and form.values(codes).shape == (3, 8 * vectors)


def test_the_feedback_is_a_block_decomposition_of_the_hessian():
    H = damped(correlated(40).gram.double())
    U = torch.eye(40) + feedback(H)
    D = torch.linalg.solve(U, torch.linalg.solve(U, H).T)
    blocks = torch.arange(40) // 8
    assert D[blocks[:, None] != blocks].abs().max() < 1e-9 * D.abs().max()
    assert not feedback(H)[blocks[:, None] >= blocks].any()


def test_feedback_of_an_identity_is_plain_rounding():
    weight = normal(16, 48)
    rounded, _ = rounded_at(weight, feedback(torch.eye(48, dtype=torch.float64)).float(), 1.0, RowFormat(6, 12))
    assert torch.equal(rounded.codes.view(-1, 2), VectorFormat(2).nearest(weight.view(-1, 8)))


def test_errors_are_fed_back_in_chunks_of_inputs_with_the_same_result(monkeypatch):
    weight, H, form = normal(8, 72), damped(correlated(72).gram.double()), RowFormat(9, 18)
    A = feedback(H).float()
    whole, error = rounded_at(weight, A, 1.0, form)
    targets = weight + error - error @ (torch.eye(72) + A)  # W' - N, where N = E (I + A) is what rounding itself changes
    assert torch.equal(VectorFormat(2).nearest(targets.view(-1, 8)), whole.codes.view(-1, 2))
    monkeypatch.setattr(block_ldlq_module, "CHUNK", 16)
    chunks, _ = rounded_at(weight, A, 1.0, form)
    assert torch.equal(chunks.codes, whole.codes)


@pytest.mark.parametrize("width", WIDTHS)
def test_feedback_lowers_the_weighted_error_of_plain_rounding_on_correlated_inputs(width):
    weight, H, form, vector = normal(32, 64), correlated(64).gram.double(), RowFormat(8, 8 * width), VectorFormat(width)
    rounded = block_ldlq(weight, H, form)
    plain = vector.values(vector.nearest(weight.view(-1, 8))).view(32, 64)
    found = rounded.scale * form.values(rounded.codes)
    losses = [float((((W - weight).double() @ H) * (W - weight)).sum()) for W in (found, plain)]
    assert losses[0] < 0.7 * losses[1]


def loss(weight: torch.Tensor, H: torch.Tensor, rounded: RoundedToLattice, form: RowFormat) -> float:
    """tr(E H E^T) of the error E, in fp64."""
    E = (rounded.scale * form.values(rounded.codes) - weight).double()
    return float(((E @ H.double()) * E).sum())


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 5), st.integers(1, 4), st.floats(1, 4), st.integers(1, 40), st.integers(0, 99))
def test_no_sweep_raises_the_weighted_error_of_any_rounding(m, count, width, tokens, seed):
    weight, form = normal(m, 8 * count, seed=seed), RowFormat(count, int(width * count))
    H = damped(correlated(8 * count, tokens).gram)  # of few tokens: singular before the damping
    before = RoundedToLattice(random_codes(m, form.size, seed), 0.7)
    after = swept(weight, H, before, form)
    assert loss(weight, H, after, form) <= loss(weight, H, before, form) * (1 + 1e-5)


def test_a_sweep_over_one_vector_finds_the_nearest_point_and_the_best_scale(monkeypatch):
    monkeypatch.setattr(block_ldlq_module, "SWEEPS", 1)
    weight, form = normal(64, 8), RowFormat(1, 1)
    after = swept(weight, torch.eye(8), RoundedToLattice(torch.zeros(64, 1, dtype=torch.uint8), 1.5), form)
    assert torch.equal(after.codes, VectorFormat(1).nearest(weight / 1.5))
    points = form.values(after.codes).flatten()
    assert after.scale == pytest.approx(
        float(torch.linalg.lstsq(points[:, None], weight.flatten()[:, None]).solution), rel=1e-5
    )


@pytest.mark.parametrize("width", WIDTHS)
def test_sweeps_lower_the_weighted_error_that_feedback_leaves(width, monkeypatch):
    weight, gram, form = normal(32, 64), correlated(64).gram.double(), RowFormat(8, 8 * width)
    after = loss(weight, damped(gram), block_ldlq(weight, gram, form), form)
    monkeypatch.setattr(block_ldlq_module, "SWEEPS", 0)
    assert after < 0.97 * loss(weight, damped(gram), block_ldlq(weight, gram, form), form)


def test_an_error_where_the_inputs_hardly_ever_are_still_costs_the_damping():
    """With one input that outweighs all others, the others are rounded about as well as without any feedback."""
    weight, form = normal(64, 64), RowFormat(8, 16)
    gram = torch.eye(64, dtype=torch.float64) * 1e-6
    gram[0, 0] = 1.0
    rounded = block_ldlq(weight, gram, form)
    error = (rounded.scale * form.values(rounded.codes) - weight)[:, 8:].square().mean()
    alone = (0.96 * VectorFormat(2).values(VectorFormat(2).nearest(weight[:, 8:].reshape(-1, 8) / 0.96))).view(64, 56)
    assert error < 1.2 * (alone - weight[:, 8:]).square().mean()


@pytest.mark.parametrize("m, n", [(5, 7), (24, 8), (13, 33)])
@pytest.mark.parametrize("width", [0, *WIDTHS, 1.5, 2.3, 3.75])
def test_the_forward_pass_is_a_product_with_the_matrix(m, n, width):
    term, x = random_term(m, n, width), normal(2, 3, n, seed=1)
    torch.testing.assert_close(term(x), x @ term.dense().T, rtol=1e-4, atol=1e-4)
    low = term.as_stored(torch.bfloat16)
    y = low(x.bfloat16())
    assert y.dtype == low.dense().dtype == torch.bfloat16 and low.dense().shape == (m, n)
    torch.testing.assert_close(y.float(), x @ term.dense().T, rtol=0.05, atol=0.05 * n**0.5)
    torch.testing.assert_close(term.scaled(-2.0).dense(), -2 * term.dense())


def test_rows_are_decoded_panel_by_panel_and_gradients_reach_the_inputs_and_the_scale(monkeypatch):
    from nla.terms import lattice_term

    term = random_term(13, 20, 3)
    sizes, decode = [], LatticeTerm.rows
    monkeypatch.setattr(lattice_term, "PANEL", 5 * 24)
    monkeypatch.setattr(LatticeTerm, "rows", lambda t, panel, dtype: sizes.append(panel) or decode(t, panel, dtype))
    x = normal(4, 20, seed=1).requires_grad_()
    d = normal(4, 13, seed=2)
    with torch.no_grad():
        term(x)
    assert [panel.stop - panel.start for panel in sizes] == [5, 5, 3]
    d_x, d_scale = torch.autograd.grad((term(x) * d).sum(), [x, term.scale])
    assert len(sizes) == 3 * 3  # again in the backward pass
    monkeypatch.undo()
    torch.testing.assert_close(d_x, d @ term.dense())
    torch.testing.assert_close(d_scale, (x @ term.dense().T * d).sum() / term.scale)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [*WIDTHS, 2.4])
def test_bits_are_those_of_all_tensors_and_a_checkpoint_restores_the_matrix(width, dtype):
    term = random_term(9, 21, width).as_stored(dtype)
    tensors, info = pack({"a": term})
    again = unpack(tensors, json.loads(json.dumps(info)))["a"]
    assert torch.equal(again.dense(), term.dense()) and again.config() == term.config()
    assert term.bits() == 8 * sum(t.nbytes for t in term.state_dict().values()) == lattice_bits(9, int(3 * width), dtype)
    empty = empty_term(term.config())
    assert (empty.bits(), empty.count()) == (term.bits(), term.count()) == (term.bits(), 9 * 21 + 1)
    assert term.describe() == f"e8 bits={int(3 * width) / 3:.3g}" and term.rank_bound() is None


@settings(deadline=None, max_examples=40)
@given(st.integers(1, 300), st.integers(1, 300), st.floats(0.5, 15))
def test_a_plan_has_the_most_bits_that_fit_and_exists_from_the_least_bits_on(m, n, per_weight):
    method, bits = QuIP(False), int(per_weight * m * n)
    term = method.plan_matrix(m, n, bits, torch.bfloat16)
    least = method.least_bits([(m, n)], torch.bfloat16)
    assert term.bits() <= bits and (term.count() > 0) == (bits >= least)
    assert method.plan_matrix(m, n, least, torch.bfloat16).bits() == least
    assert bits < least or bits - term.bits() < 8 * m or term.size == 4 * -(-n // 8)


@pytest.mark.parametrize("shape", [(24, 64), (13, 43)])
def test_a_fit_reports_its_true_errors_and_more_bits_lower_them(shape):
    weight, statistics = normal(*shape) * 0.02, correlated(shape[1])
    G = statistics.gram.double()
    errors = []
    for bits in WIDTHS:
        fit = compress(QuIP(False), weight, bits + 0.9, statistics)
        E = (fit.term.dense().detach() - weight).double()
        expected = float(((E @ G) * E).sum() / ((weight.double() @ G) * weight).sum())
        spare, most = int((bits + 0.9) * weight.numel()) - lattice_bits(len(weight), 0, torch.float32), 4 * -(-shape[1] // 8)
        assert fit.term.size == min(spare // (8 * len(weight)), most)
        assert fit.status == "rounded" and fit.losses == [(0, pytest.approx(expected, rel=1e-3))]
        assert fit.weighted_error == pytest.approx(expected, rel=1e-3)
        errors.append(fit.weighted_error)
    assert errors == sorted(errors, reverse=True) and errors[1] < 0.1


@pytest.mark.parametrize("tokens", [0, 3])
def test_zero_matrices_zero_rows_and_singular_gram_matrices_are_fitted(tokens):
    weight, statistics, quip = normal(24, 32), correlated(32, tokens), QuIP(False)
    weight[3], weight[:, 5] = 0, 0
    statistics.gram[7], statistics.gram[:, 7] = 0, 0
    fit = compress(quip, weight, 2.5, statistics)
    assert fit.term.is_finite() and 0 < fit.relative_error < 1 and fit.weighted_error < 0.1
    assert compress(quip, weight, 2.5, Statistics(gram=torch.zeros(32, 32))).relative_error < 0.15  # no inputs: plain rounding
    zero = compress(quip, torch.zeros(24, 32), 2.5, statistics)
    assert zero.status == "zero" and zero.relative_error == 0 and not zero.term.dense().any() and zero.bits == 0


def test_a_model_in_two_bits_is_saved_and_loaded_again(run_here, tmp_path):
    import nla

    folder = tmp_path / "saved"
    few = ["statistics.windows=4", "statistics.length=32", "dtype=bfloat16", "select.include='layers.0'"]
    record = run_here(*TINY, "method=quip", "bits=2.2", *few, f"save={folder}")
    assert record.status == "done" and record.bits.selected_per_weight <= 2.2
    terms = [m for m in nla.load_compressed(folder).modules() if isinstance(m, LatticeTerm)]
    assert len(terms) == 7 and {term.size / -(-term.in_features // 8) for term in terms} == {2, 2.1, 13 / 6}


def test_too_few_bits_are_an_error_that_names_a_setting_that_works(run_here):
    with pytest.raises(UserError, match=r"use bits=1\.\d+ at least"):
        run_here(*TINY, "method=quip", "bits=0.9")
