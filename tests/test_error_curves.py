"""Bits go where the method's own errors say that they lower the expected loss most."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate

from nla.budget.base import Target
from nla.budget.error_curves import ErrorCurves, smallest_sum
from nla.machine.errors import UserError
from nla.models.select import LinearSpec
from tests.conftest import TINY, configuration
from tests.test_marginal_budget import view as with_norms

SPECS = [LinearSpec("q", 12, 8), LinearSpec("k", 12, 8), LinearSpec("v", 12, 8)]
SIZES = {"q": {48: 0.9, 96: 0.2, 192: 0.1}, "k": {48: 0.5, 96: 0.4, 192: 0.3}, "v": {48: 0.8, 96: 0.7, 192: 0.05}}
TARGET = Target(1.0, 16, "bits=1.0")  # 96 bits for each matrix


def shares(errors=SIZES, fishers=(1.0, 1.0, 1.0), candidates=(0.5, 1.0, 2.0)):
    weights = [torch.ones(12, 8)] * 3  # of equal size, so that errors can be compared
    known = with_norms(weights, fishers)

    def size(name, bits):
        return max((size for size in errors[name] if size <= bits), default=0)

    def fits(name, sizes):
        return [SimpleNamespace(weighted_error=errors[name][bits]) for bits in sizes]

    budget = instantiate(configuration("budget=error_curves", f"budget.candidates={list(candidates)}").budget, _convert_="all")
    return budget.look(SPECS, TARGET, SimpleNamespace(norms=known.norms, size=size, fits=fits))


@pytest.mark.parametrize("fishers", [(1.0, 1.0, 1.0), (1.0, 9.0, 0.1)])
def test_no_other_sizes_within_the_budget_have_a_smaller_expected_loss(fishers):
    found = shares(fishers=fishers)

    def expected(chosen):
        return sum(f * SIZES[s.name][bits] for f, s, bits in zip(fishers, SPECS, chosen, strict=True))

    allowed = [chosen for chosen in itertools.product(*(SIZES[s.name] for s in SPECS)) if sum(chosen) <= 3 * 96]
    assert sum(found.values()) <= 3 * 96
    assert expected(found.values()) == pytest.approx(min(map(expected, allowed)))


def test_a_size_that_the_method_cannot_have_is_left_out_and_none_at_all_is_an_error():
    assert shares({**SIZES, "q": {96: 0.2}})["q"] == 96
    with pytest.raises(UserError, match=r"budget\.candidates=\[0\.5, 1\.0, 2\.0\] of bits=1\.0 buy nothing for q"):
        shares({**SIZES, "q": {192: 0.1}})
    with pytest.raises(UserError, match=r"budget\.candidates=\[2\] must be multiples"):
        ErrorCurves(1.0, [2])


def test_the_sizes_fit_even_where_the_solver_is_not_exact_and_where_only_the_first_do():
    curves = [[(500_000_000, 1.0), (500_005_000, 0.5)]] * 2
    assert smallest_sum(curves, 1_000_009_100) in ([500_000_000, 500_005_000], [500_005_000, 500_000_000])
    assert smallest_sum(curves, 1_000_000_000) == [500_000_000, 500_000_000]


def test_no_matrix_is_given_more_bits_than_the_dense_one_has():
    asked, known = [], with_norms([torch.ones(12, 8)] * 3, (1.0, 1.0, 1.0))
    budget = ErrorCurves(1.0, [0.5, 1.5])
    view = SimpleNamespace(
        norms=known.norms,
        size=lambda name, bits: asked.append(bits) or bits,
        fits=lambda name, sizes: [SimpleNamespace(weighted_error=1 / bits) for bits in sizes],
    )
    budget.look(SPECS, Target(12.0, 16, "ratio=0.25"), view)
    assert set(asked) == {6 * 96, 16 * 96}


@pytest.mark.parametrize("method", ["gptq", "rtn"])  # rtn reads no inputs, so its fits have no weighted error
def test_a_run_mixes_widths_of_grids_within_its_bits(run_here, method):
    asked = ["bits=3.3", "dtype=bfloat16", "budget=error_curves", "statistics.windows=4", "statistics.length=32"]
    record = run_here(*TINY, f"method={method}", *asked, "select.include='layers.0'")
    assert record.bits.selected_per_weight <= 3.3
    assert len({fit.terms for fit in record.fits}) > 1
