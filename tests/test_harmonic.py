"""Tests of the harmonic kernel: two angles in a number, and fits that begin with the coarse one."""

import math

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st

from nla.kernels.harmonic import Harmonic
from nla.kernels.phase import Phase
from nla.machine.errors import UserError
from nla.matrix.inputs import Statistics
from nla.matrix.objective import Objective
from nla.terms.kernel_term import KernelTerm
from tests.conftest import composed
from tests.samples import normal


def turn_between(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """The size of the smallest turn from one angle to the other."""
    return ((a - b + math.pi) % (2 * math.pi) - math.pi).abs()


@settings(deadline=None, max_examples=40)
@given(st.integers(2, 40), st.integers(0, 99))
def test_a_number_has_the_fine_angle_and_is_near_the_coarse_one(order, seed):
    coarse, fine = 4 * normal(50, seed=seed).double(), 9 * normal(50, seed=seed + 1).double()
    number = Harmonic(order, 0.5).number(coarse, fine)
    assert (number - coarse).abs().max() <= math.pi / order + 1e-9
    assert turn_between(order * number, fine).max() < 1e-9


@pytest.mark.parametrize("sign", [1, -1])
def test_the_finer_start_keeps_the_coarse_matrix_and_points_to_what_it_leaves(sign):
    weight, kernel, generator = normal(60, 50), Harmonic(400, 0.5), torch.Generator().manual_seed(0)
    coarse = Phase().mixed_start(Objective(weight), 6, 1, generator).map(torch.Tensor.clone)
    coarse.mu.mul_(sign)
    kept = Phase().dense(coarse)
    finer = kernel.finer(coarse, Objective(weight - kept), generator)
    torch.testing.assert_close(Phase().dense(finer), kept, rtol=0, atol=0.02)  # coarse angles are exact to pi / 400
    harmonic = kernel.dense(finer) - Phase().dense(finer)
    assert float((harmonic * (weight - kept)).sum() / (harmonic.norm() * (weight - kept).norm())) > 0.3


def error_of(kernel: str, dtype: torch.dtype = torch.float32) -> float:
    """The error of a matrix without structure, fitted with scales, in half of its parameters."""
    asked = ["method=nla_outputs", f"kernel={kernel}", "storage=scaled", "method.fallback=null", "solver.steps=150"]
    method = instantiate(composed(*asked, "solver.products=float32").method, _convert_="all")
    weight, statistics = normal(64, 48).to(dtype), Statistics(gram=torch.eye(48))
    (fit,) = method.compress([weight], 64 * 48 * 4 * dtype.itemsize, [statistics], torch.Generator().manual_seed(0))
    assert fit.n_params <= 64 * 48 // 2
    return fit.relative_error


def test_a_fit_that_begins_with_phase_ends_far_below_phase_at_equal_size():
    assert error_of("harmonic") < 0.6 * error_of("phase")


def test_numbers_of_16_bits_are_precise_enough_for_two_angles():
    assert error_of("harmonic", torch.bfloat16) < 1.2 * error_of("harmonic")


def test_a_bf16_term_computes_the_fine_angle_of_its_own_numbers():
    t = Harmonic(12, 0.7).random_start(20, 30, 5, 1, torch.Generator().manual_seed(0)).map(torch.Tensor.bfloat16)
    low = KernelTerm(Harmonic(12, 0.7), t).dense()
    exact = KernelTerm(Harmonic(12, 0.7), t.map(torch.Tensor.double)).dense()
    assert (low.double() - exact).norm() < 0.02 * exact.norm()  # 12 a, rounded to bf16, would be off by up to 0.1


def test_rates_are_those_of_phase_for_the_fine_angle():
    kernel = Harmonic(10, 0.7)
    assert kernel.fitting_rate == pytest.approx(0.1) and kernel.training_rate == pytest.approx(Phase.training_rate / 10)
    assert kernel.rank_bound(3, 2) == 24


@pytest.mark.parametrize(
    "order, weight, said", [(1, 0.7, "kernel.order=1"), (2.5, 0.7, "kernel.order=2.5"), (12, 0, "kernel.weight=0")]
)
def test_orders_below_two_and_weights_that_are_not_positive_are_refused(order, weight, said):
    with pytest.raises(UserError, match=said):
        Harmonic(order, weight)
