"""Tests of triplets whose A and B are codes of a few bits: their matrix, size, gradient, fit, and runs of `run.py`."""

import itertools

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from nla.codes.codebook import codebook_of
from nla.compressed.contents import matrix_terms
from nla.kernels.linear import Linear
from nla.kernels.phase import Phase
from nla.kernels.piecewise import Piecewise
from nla.machine.errors import UserError
from nla.matrix.inputs import Statistics
from nla.matrix.objective import Norms, Objective
from nla.matrix.triplets import Triplets
from nla.solvers.coordinates import Coordinates, improved, solved
from nla.storage.base import Coded
from nla.terms.base import shares
from nla.terms.coded import CHUNK, CodedTerm, coded_size
from nla.terms.rounded import PARTS, RoundedTerm
from nla.terms.state import empty_term, pack, unpack
from tests.conftest import TINY, composed
from tests.samples import normal

KERNELS = {"angle": Phase, "int": Linear}


def rounded(kind: str, width: int, m: int, n: int, h: int, r: int = 1, kernel=None) -> RoundedTerm:
    """A term with random numbers and scales."""
    triplets = Triplets(1.5 * normal(m, h, r), 1.5 * normal(n, h, r, seed=1), normal(h, seed=2))
    kernel = kernel or KERNELS[kind](r)
    return RoundedTerm(kernel, codebook_of(kind, width), triplets, 1 + 0.1 * normal(m, seed=3), 1 + 0.1 * normal(n, seed=4))


def objective(m: int, n: int, tokens: int = 200) -> Objective:
    x = normal(tokens, n, seed=5) * torch.linspace(0.2, 2, n) + normal(tokens, 1, seed=6)
    return Norms(normal(m, n, seed=7), Statistics(gram=x.T @ x)).outputs


SIZES = {"m": st.integers(1, 30), "n": st.integers(1, 30), "h": st.integers(0, 2 * CHUNK + 3)}


@settings(deadline=None, max_examples=40)
@given(kind=st.sampled_from(list(KERNELS)), width=st.integers(1, 8), r=st.integers(1, 2), **SIZES)
def test_the_matrix_of_codes_is_the_formula_of_the_nearest_values(kind, width, r, m, n, h):
    free = rounded(kind, width, m, n, h, r)
    term, book = free.packed(), free.codebook
    values = book.values(torch.arange(2**width))
    for codes, numbers in ((book.nearest(free.A), free.A), (book.nearest(free.B), free.B)):
        distance = (numbers.detach()[..., None] - values).abs()
        if kind == "angle":  # around the circle
            distance = torch.minimum(distance % (2 * torch.pi), -distance % (2 * torch.pi))
        torch.testing.assert_close(distance.gather(-1, codes[..., None])[..., 0], distance.min(-1).values, atol=1e-5, rtol=0)
    k = term.kernel.entry(values[book.nearest(free.A)][:, None], values[book.nearest(free.B)][None])  # (out, in, h)
    expected = free.rows[:, None] * free.columns * (k * free.mu).sum(-1)
    torch.testing.assert_close(term.dense(), expected, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(free.dense(), expected, rtol=1e-3, atol=1e-3)
    x = normal(2, 3, n, seed=8)
    torch.testing.assert_close(term(x), x @ expected.T, rtol=1e-3, atol=1e-2)
    assert term.trainable().packed().A.equal(term.A) and term.rank_bound() == term.kernel.columns(h, r)


@pytest.mark.parametrize("width", [2, 4, 8])
@pytest.mark.parametrize("kind", KERNELS)
def test_numbers_in_bf16_are_trained_as_the_values_that_are_stored(kind, width):
    """In bf16, a quotient can fall on the border of two codes; the other code is a whole step away."""
    book = codebook_of(kind, width)
    codes = torch.randint(2**width, (40_000,), generator=torch.Generator().manual_seed(1))
    numbers = (book.values(codes) + 0.6 * normal(40_000)).bfloat16()
    distance = (book.snapped(numbers).float() - book.values(book.nearest(numbers))).abs()
    if kind == "angle":  # around the circle
        distance = torch.minimum(distance % (2 * torch.pi), -distance % (2 * torch.pi))
    assert book.snapped(numbers).dtype == torch.bfloat16 and distance.max() < 0.02  # bf16's own error, below 8


@pytest.mark.parametrize("kind", ["angle", "int"])
def test_numbers_in_training_are_held_row_by_row(kind):
    """Checkpoints restore the optimiser's moments so, and a fused optimiser reads both in memory order."""
    kernel, codebook = (Phase() if kind == "angle" else Linear()), codebook_of(kind, 3)
    triplets = Triplets(normal(5, 3, 2), normal(4, 3, 2, seed=1), torch.ones(3))
    term = CodedTerm.of(kernel, codebook, triplets, torch.ones(5), torch.ones(4)).trainable()
    assert all(p.is_contiguous() for p in term.parameters())


@settings(deadline=None, max_examples=60)
@given(st.sampled_from(list(KERNELS)), st.integers(1, 8), st.integers(1, 200), st.integers(1, 200), st.floats(0.3, 9))
def test_a_plan_has_the_most_triplets_that_the_bits_allow_and_counts_what_is_stored(kind, width, m, n, per_weight):
    storage, kernel, bits = Coded(kind, width, 0), KERNELS[kind](), int(per_weight * m * n)
    planned = storage.plan(kernel, m, n, bits, torch.bfloat16)
    assert planned.bits() <= bits and (planned.count() > 0) == (bits >= storage.least_bits(m, n, torch.bfloat16))
    more = CodedTerm.empty(kernel, kind, width, m, n, planned.h + 1, 1, torch.bfloat16)
    assert more.bits() > bits and coded_size(m, n, 1, width, more.bits(), 16) == planned.h + 1
    assert planned.bits() == (8 * sum(t.numel() * t.element_size() for t in planned.state_dict().values()) if planned.h else 0)


def test_a_forward_pass_of_many_parts_in_bf16_is_about_as_exact_as_one_product():
    with torch.no_grad():
        term = rounded("angle", 4, 64, 48, 16 * CHUNK).packed().as_stored(torch.bfloat16)
        x = normal(100, 48, seed=8).bfloat16()
        left, right = term.factors()
        exact = x.float() @ right.float() @ left.float().T
        of_parts, of_one = (float((y - exact).norm()) for y in (term(x), (x @ right) @ left.T))
    assert 0 < of_parts < 1.5 * of_one


@pytest.mark.parametrize("tokens", [1, 500])
def test_the_operations_of_a_forward_pass_are_those_that_it_does(tokens):
    term = rounded("angle", 4, 64, 48, 100)  # so many triplets that multiplying them out would take fewer, for many tokens
    for form in (term, term.packed()):
        with FlopCounterMode(display=False) as counter:
            form(normal(tokens, 48))
        assert counter.get_total_flops() == form.forward_flops(tokens)


def test_terms_that_share_nothing_are_each_counted_in_full():
    terms = [rounded("angle", 4, 24, 32, 8, 2) for _ in range(6)]
    assert set(shares(terms)) == {(term.count(), term.bits()) for term in terms} and len(set(shares(terms))) == 1


def test_codes_are_restored_from_a_checkpoint_bit_for_bit():
    terms = {"a": rounded("angle", 3, 13, 9, 7).packed(), "b": rounded("int", 4, 5, 21, 70).packed().as_stored(torch.bfloat16)}
    tensors, info = pack(terms)
    for name, restored in unpack(tensors, info).items():
        assert restored.dense().equal(terms[name].dense()) and restored.config() == terms[name].config()
        assert [t.shape for t in empty_term(info["terms"][name]).state_dict().values()] == [
            t.shape for t in terms[name].state_dict().values()
        ]


@pytest.mark.parametrize("kind", KERNELS)
def test_the_gradient_is_that_of_the_matrix_at_the_rounded_numbers(kind):
    term, x, d = rounded(kind, 3, 6, 5, 4), normal(7, 5, seed=9), normal(7, 6, seed=10)
    found = torch.autograd.grad((term(x) * d).sum(), [getattr(term, part) for part in PARTS])
    exact = [p.detach().double().requires_grad_() for p in (*term.triplets.tensors, term.rows, term.columns)]
    A, B, mu, rows, columns = exact
    matrix = rows[:, None] * columns * (term.kernel.entry(A[:, None], B[None]) * mu).sum(-1)
    expected = torch.autograd.grad(((x.double() @ matrix.T) * d.double()).sum(), exact)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind, r", [("angle", 1), ("angle", 2), ("int", 1), ("int", 2)])
def test_no_step_of_coordinate_descent_raises_the_error(kind, r):
    goal = objective(20, 16)
    found = Coordinates(rounded(kind, 3, 20, 16, 6, r), goal, torch.Generator().manual_seed(0))
    errors = [found.error()]
    for _, work in itertools.product(range(3), (found.fit_scales, found.improve_a, found.improve_b)):
        work()
        errors.append(found.error())
        assert errors[-1] <= errors[-2] * (1 + 1e-5)
        matrix = found.result().packed().dense()
        squared = ((matrix - goal.weight).detach().double() @ goal.wide_root).square().sum()
        assert errors[-1] == pytest.approx(float(squared) / goal.energy, rel=1e-4)
    assert errors[-1] < 0.9 * errors[1]


def test_one_column_of_a_gets_the_best_of_all_codes_and_one_row_of_b_never_a_worse_one():
    goal = objective(4, 3)
    found = Coordinates(rounded("angle", 3, 4, 3, 1), goal, torch.Generator().manual_seed(0))
    found.fit_scales()
    found.improve_a()
    reached = found.error()
    kept, tried = found.a.clone(), []
    for codes in itertools.product(range(8), repeat=4):
        found.a = torch.tensor(codes)[:, None]
        tried.append(found.error())
    assert reached == pytest.approx(min(tried), rel=1e-5)
    found.a = kept
    found.improve_b()
    assert found.error() <= reached * (1 + 1e-6)


def test_scales_of_columns_are_at_the_least_squares_solution():
    goal = objective(12, 10)
    found = Coordinates(rounded("int", 2, 12, 10, 8), goal, torch.Generator().manual_seed(0))
    found.fit_scales()
    columns = found.columns.double().requires_grad_()
    matrix = found.left().flatten(1).double() @ (found.g[found.b].double() * columns[:, None, None]).flatten(1).T
    loss = ((matrix - goal.weight.double()) @ goal.wide_root).square().sum()
    (gradient,) = torch.autograd.grad(loss, columns)
    assert float(gradient.norm()) < 1e-3 * float(loss.detach())


def test_scales_that_change_nothing_are_zero():
    """So are those of columns whose cosines, or inputs, are all zero."""
    assert torch.equal(solved(torch.zeros(3, 3), torch.zeros(3)), torch.zeros(3))


def test_a_kernel_without_features_keeps_its_term():
    term = rounded("int", 3, 6, 5, 4, kernel=Piecewise(1))
    assert improved(term, objective(6, 5), 3, torch.Generator()) == (term, [])


def method(*settings: str):
    return instantiate(composed(*settings, "solver.steps=60", "solver.products=float32").method, _convert_="all")


def fit(weight: torch.Tensor, per_weight: float, *settings: str, statistics: Statistics | None = None):
    x = normal(300, weight.shape[1], seed=11) * torch.linspace(0.1, 2, weight.shape[1])
    known = statistics or Statistics(gram=x.T @ x)
    return method(*settings).compress_matrix(weight, int(per_weight * weight.numel()), known, torch.Generator().manual_seed(0))


OWN_NORM = ["method=nla kernel=phase storage=angle4", "method=nla kernel=piecewise storage=int4"]
ASKED = ["method=nla_angles", "method=nla_levels", *OWN_NORM]


@pytest.mark.parametrize("asked", ASKED)
def test_a_fit_in_few_bits_is_reproducible_and_far_below_float_factors_of_its_size(asked):
    weight = (normal(64, 12) @ normal(12, 48, seed=1) + 0.3 * normal(64, 48, seed=2)).to(torch.bfloat16)
    first, again = (fit(weight, 4, *asked.split()) for _ in range(2))
    assert (
        first.term.A.equal(again.term.A) and first.term.mu.equal(again.term.mu) and first.weighted_error == again.weighted_error
    )
    assert isinstance(first.term, CodedTerm) and first.bits <= 4 * weight.numel() and first.status == "rounded"
    own, rival = ("relative_error", "svd_error") if asked in OWN_NORM else ("weighted_error", "svd_llm_error")
    assert getattr(first, own) < 0.75 * getattr(first, rival)
    losses = [loss for _, loss in first.losses]
    assert losses[-1] <= losses[0] and first.optimum is None


@pytest.mark.parametrize("asked", ASKED[:2])
def test_singular_gram_matrices_and_zero_weights_are_fitted(asked):
    gram = normal(3, 20)
    weight = normal(24, 20, seed=1)
    weight[5] = 0
    found = fit(weight, 8, asked, statistics=Statistics(gram=gram.T @ gram))
    assert found.term.is_finite() and found.weighted_error < 0.1
    assert fit(torch.zeros(24, 20), 8, asked).status == "zero"


def test_the_width_of_codes_follows_the_bits_per_weight():
    for kind, expected in (("angle", [3, 3, 4, 4, 5]), ("int", [1, 2, 2, 3, 4])):
        storage = Coded(kind, None, 0)
        plans = [storage.plan(KERNELS[kind](), 64, 64, int(b * 4096), torch.bfloat16) for b in (1, 1.7, 2.3, 3, 4.5)]
        assert [plan.codebook.width for plan in plans] == expected


REFUSED = {
    "method=nla kernel=linear storage=angle3": "storage=angle3 holds one angle a number, unlike kernel=linear",
    "method=nla kernel=gaussian storage=int4": "storage=int4 needs a kernel with thin factors, unlike kernel=gaussian",
    "method=nla kernel=phase storage=int4": "storage=int4 needs triplets that can be scaled",
    "method=nla kernel=phase storage=angle3 storage.width=9": "storage.width=9 is not known; allowed: 1, 2,",
    "method=nla kernel=phase storage=angle3 storage.rounds=-1": "storage.rounds=-1",
    "method=svd_llm storage=angle3": "use storage=float, int8, int4, int3 or int2",
    "method=svd_llm storage=scaled": "use storage=float, int8, int4, int3 or int2",
    "method=nla kernel=gaussian storage=scaled": "storage=scaled needs a kernel with thin factors, unlike kernel=gaussian",
    "method=hybrid storage=angle3": "method=hybrid stores no codes of a few bits; use storage=scaled or storage=float",
    "method=hybrid method.fallback=svd": "method.fallback=svd is not known",
}


@pytest.mark.parametrize("asked", REFUSED)
def test_storages_that_do_not_fit_are_refused_before_the_work(asked):
    with pytest.raises(Exception, match=r".") as caught:
        method(*asked.split())
    refusal = caught.value if isinstance(caught.value, UserError) else caught.value.__cause__
    assert isinstance(refusal, UserError) and REFUSED[asked] in str(refusal)


def test_a_run_refines_retrains_saves_and_loads_rounded_triplets(run_here, tmp_path):
    import nla

    asked = ["method=nla_angles", "bits=6", "dtype=bfloat16", "solver.steps=20", "refine=block", "refine.epochs=2"]
    asked += ["select.include='q_proj|up_proj'"]
    folder = tmp_path / "saved"
    trained = ["retrain.steps=2", "retrain.length=32", "retrain.watch=0", f"save={folder}"]
    record = run_here(*TINY, *asked, *trained, "statistics.windows=40", "statistics.length=32")
    assert record.bits.selected_per_weight <= 6 and record.refinement.error_after <= record.refinement.error_before
    loaded = matrix_terms(nla.load_compressed(folder))
    assert len(loaded) == 4 and all(isinstance(term, CodedTerm) for term in loaded.values())
    assert sum(term.bits() for term in loaded.values()) == pytest.approx(
        record.bits.selected_per_weight * sum(t.out_features * t.in_features for t in loaded.values())
    )
    again = run_here(*TINY, *asked, *trained[:-1], "statistics.windows=40", "statistics.length=32")
    assert again.metrics == record.metrics
