"""What each matrix gets: by ratio or by bits, by effective rank, and what a hybrid makes of it."""

import math
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st

from nla.budget.base import Target
from nla.budget.effective_rank import EffectiveRank, effective_rank, in_proportion
from nla.budget.plan import make_plan
from nla.budget.uniform import Uniform
from nla.machine.errors import UserError
from nla.matrix.inputs import Statistics
from nla.matrix.objective import Norms
from nla.matrix.spectrum import Spectrum
from nla.matrix.triplets import triplet_size
from nla.methods.svd import SVD
from nla.methods.svd_llm import SVDLLM
from nla.models.select import LinearSpec
from nla.storage.base import Float
from nla.terms.triplet_terms import triplet_terms
from tests.conftest import configuration

RANKS = (1, 4, 9)
SAME = [LinearSpec(f"{i}.q_proj", 24, 16) for i in range(3)]  # of one kind
SPECS = [LinearSpec(f"{i}.{kind}_proj", 24, 16) for i in range(3) for kind in "qkv"]


def of_values(m: int, n: int, values: list[float], seed: int = 0) -> torch.Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(m, m, generator=generator))
    right, _ = torch.linalg.qr(torch.randn(n, n, generator=generator))
    return left[:, : len(values)] * torch.tensor(values) @ right[:, : len(values)].T


def test_effective_rank_counts_equal_singular_values_and_is_one_for_rank_one_or_zero():
    assert effective_rank(Spectrum(of_values(12, 9, [2.0] * 5))) == pytest.approx(5, rel=1e-4)
    assert effective_rank(Spectrum(of_values(12, 9, [3.0]))) == pytest.approx(1, rel=1e-4)
    assert effective_rank(Spectrum(torch.zeros(4, 4))) == pytest.approx(1)
    p = [0.8, 0.2]
    by_hand = math.exp(-sum(x * math.log(x) for x in p))
    assert effective_rank(Spectrum(of_values(12, 9, [x**0.5 for x in p]))) == pytest.approx(by_hand, rel=1e-4)


class View(SimpleNamespace):
    """Weights by name, and inputs that are white unless given."""

    def norms(self, name: str) -> Norms:
        weight = self.weights[name]
        return Norms(weight, Statistics(gram=self.grams.get(name, torch.eye(weight.shape[1]))))


def view(grams=None) -> View:
    weights = [of_values(24, 16, [1.0] * rank, seed=rank) for rank in RANKS]
    return View(weights={spec.name: weights[int(spec.name[0])] for spec in SPECS}, grams=grams or {})


def budget(**changes) -> EffectiveRank:
    return instantiate(configuration("budget=effective_rank", *(f"budget.{k}={v}" for k, v in changes.items())).budget)


def test_the_rank_of_a_matrix_is_in_proportion_to_the_root_of_its_effective_rank_over_its_size():
    first, second, third = budget().look(SAME, Target(8.0, 32, "ratio=0.75"), view()).values()
    assert second / first == pytest.approx(2, rel=1e-2)  # sqrt(4 / 40) to sqrt(1 / 40)
    assert third / first == pytest.approx(3, rel=1e-2)
    total = 8 * sum(s.n_params for s in SAME)
    assert total - len(SAME) <= first + second + third <= total


def test_matrices_of_another_kind_get_none_of_it():
    specs = [*SAME, LinearSpec("0.v_proj", 24, 16), LinearSpec("2.v_proj", 24, 16)]
    shares = budget().look(specs, Target(8.0, 32, "ratio=0.75"), view())
    assert {name: bits for name, bits in shares.items() if "q" in name} == budget().look(SAME, Target(8.0, 32, ""), view())
    assert shares["2.v_proj"] / shares["0.v_proj"] == pytest.approx(3, rel=1e-2)


def test_effective_rank_is_that_of_the_whitened_weight():
    """Inputs that only ever point one way leave one singular value of W L."""
    direction = torch.zeros(16, 16)
    direction[0, 0] = 100.0
    shares = budget().look(SAME, Target(8.0, 32, ""), view({"2.q_proj": direction + 1e-6 * torch.eye(16)}))
    assert shares["2.q_proj"] == pytest.approx(shares["0.q_proj"], rel=0.02)


def test_a_fraction_of_queries_and_keys_moves_to_values_but_never_more_than_they_can_hold():
    target = Target(8.0, 32, "")
    before, after = (budget(moved=m).look(SPECS, target, view()) for m in (0.0, 0.25))
    for name in ("1.q_proj", "1.k_proj"):
        assert after[name] == pytest.approx(0.75 * before[name], rel=1e-3)
    assert sum(after.values()) == pytest.approx(sum(before.values()), abs=4)
    full = budget(moved=0.9).look(SPECS, Target(24.0, 32, ""), view())
    assert max(full.values()) <= 32 * 24 * 16
    with pytest.raises(Exception, match=r"budget\.moved=1\.5"):
        budget(moved=1.5)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.tuples(st.floats(0.01, 9), st.floats(1, 99)), min_size=1, max_size=8), st.floats(0, 1))
def test_shares_fill_the_total_and_nobody_gets_more_than_the_most(rows, part):
    weights = {str(i): weight for i, (weight, _) in enumerate(rows)}
    most = {str(i): limit for i, (_, limit) in enumerate(rows)}
    total = part * sum(most.values())
    found = in_proportion(weights, most, total)
    assert sum(found.values()) == pytest.approx(total) and all(found[n] <= most[n] * (1 + 1e-9) for n in most)
    free = [n for n in most if found[n] < most[n] * (1 - 1e-9)]
    assert len({round(found[n] / weights[n] / (total or 1), 6) for n in free}) <= 1


def test_a_budget_by_effective_rank_runs_and_stays_within_the_ratio(run_here):
    arguments = ["model=tiny_llama", "task.window=64", "task.max_windows=1", "track=none", "statistics.windows=8"]
    record = run_here(*arguments, "statistics.length=32", "method=svd", "budget=effective_rank", "ratio=0.5")
    assert record.parameters.ratio >= 0.5 and len({fit.n_params for fit in record.fits if fit.shape == (48, 48)}) > 1


@settings(max_examples=60, deadline=None)
@given(
    m=st.integers(1, 60),
    n=st.integers(1, 60),
    ratio=st.floats(0.01, 0.99),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_plan_by_bits_is_the_plan_by_the_ratio_that_leaves_as_many(m, n, ratio, dtype):
    width, specs = 8 * dtype.itemsize, [LinearSpec("one", m, n), LinearSpec("two", n, m)]
    plans = []
    for target in (Target((1 - ratio) * width, width, f"ratio={ratio}"), Target((1 - ratio) * width, width, "bits=...")):
        try:
            plans.append(make_plan(specs, target, Uniform().allocate(specs, target), SVD(), dtype).kept)
        except UserError as error:
            plans.append(str(error).split(" leaves ")[1].split(";")[0])
    assert plans[0] == plans[1]
    if isinstance(plans[0], dict):
        assert all(kept <= (1 - ratio) * m * n for kept in plans[0].values())
        assert all(int((1 - ratio) * m * n) - kept < triplet_size(m, n, 1) for kept in plans[0].values())


def test_too_few_bits_name_the_matrix_and_how_many_would_do():
    specs, target = [LinearSpec("fc", 40, 30)], Target(1.0, 32, "bits=1.0")
    with pytest.raises(UserError, match=r"bits=1\.0 leaves fc \(40x30\) 37 parameters.*of 71; use bits=1\.894 at least"):
        make_plan(specs, target, Uniform().allocate(specs, target), SVD(), torch.float32)
    with pytest.raises(UserError, match=r"leaves fc .* 30 parameters.*less than its even share; use budget=uniform"):
        make_plan(specs, Target(4.0, 32, "bits=4.0"), {"fc": 960}, SVD(), torch.float32)
    enough = Target(1.894, 32, "bits=1.894")
    assert make_plan(specs, enough, Uniform().allocate(specs, enough), SVD(), torch.float32).kept == {"fc": 71}


def hybrid(*overrides: str):
    values = configuration("method=hybrid", "solver.products=float32", *overrides)
    return instantiate(values.method, _convert_="all")


@settings(max_examples=60, deadline=None)
@given(m=st.integers(1, 60), n=st.integers(1, 60), spare=st.integers(-200, 4000), share=st.floats(0.01, 0.99))
def test_a_hybrid_has_both_terms_within_its_bits_or_none(m, n, spare, share):
    method = hybrid(f"method.linear_share={share}")
    bits = max(0, method.least_bits([(m, n)], torch.float32) + 32 * spare)
    planned = method.plan_matrix(m, n, bits, torch.float32)
    assert [term.h >= 1 for term in triplet_terms(planned)] == [spare >= 0, spare >= 0]
    if spare >= 0:
        assert planned.bits() <= bits < planned.bits() + 32 * triplet_size(m, n, 1)
    else:
        assert planned.count() == planned.bits() == 0


def test_a_hybrid_ends_below_svd_llm_and_below_its_start():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(48, 64, generator=generator), torch.randn(200, 64, generator=generator)
    statistics, bits = Statistics(gram=x.T @ (x * torch.logspace(0, -1, 64))), 32 * 1500
    known = [Statistics(gram=(statistics.gram + statistics.gram.T) / 2)]
    (fit,) = hybrid("solver.steps=150").compress([weight], bits, known, torch.Generator().manual_seed(0))
    (linear,) = SVDLLM(False, 0.0, Float()).compress([weight], bits, known, torch.Generator())
    assert fit.weighted_error < 0.9 * linear.weighted_error and fit.losses[-1][1] < 0.9 * fit.losses[0][1]
    assert fit.n_params <= 1500 and [t.kernel.name for t in triplet_terms(fit.term)] == ["linear", "harmonic"]
    with pytest.raises(Exception, match=r"method\.linear_share=1\.5"):
        hybrid("method.linear_share=1.5")
