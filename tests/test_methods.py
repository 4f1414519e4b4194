"""Every method of conf/method: within its budget, with true errors, stored in the weight's type."""

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st

from nla.errors import NonFiniteError
from nla.linalg import Spectrum
from nla.methods.svd import SVD
from tests.conftest import configuration, options

METHODS = options("method")


def make_method(name: str):
    values = configuration(f"method={name}", "kernel=phase", "solver.steps=5", "solver.products=float32")
    return instantiate(values.method, _convert_="all")


def compress(method, weight, n_params, seed=0):
    return method.compress(weight, n_params, torch.Generator().manual_seed(seed))


def dense(fit):
    return sum(kernel.dense(t.map(torch.Tensor.double)) for kernel, t in fit.terms)


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    spare=st.integers(0, 400),
    kind=st.sampled_from(["full", "rank one", "zero"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_a_fit_keeps_its_budget_and_reports_its_true_error(name, m, n, spare, kind, dtype):
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(m * n))
    weight = {"full": weight, "rank one": weight[:, :1] @ weight[:1], "zero": 0 * weight}[kind].to(dtype)
    budget = m + n + 1 + spare
    fit = compress(make_method(name), weight, budget)
    assert fit.n_params <= budget
    assert all(p.dtype == dtype for _, t in fit.terms for p in (t.A, t.B, t.mu))
    energy = float(weight.double().square().sum())
    if energy:
        error = float((dense(fit) - weight.double()).square().sum()) / energy
        assert fit.relative_error == pytest.approx(error, rel=1e-3, abs=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_one_seed_gives_one_result_bit_for_bit(name):
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    first, again = (compress(make_method(name), weight, 200) for _ in range(2))
    assert torch.equal(dense(first), dense(again))
    assert (first.losses, first.relative_error, first.peak_bytes) == (again.losses, again.relative_error, again.peak_bytes)


@pytest.mark.parametrize("name", METHODS)
def test_scaling_the_weight_scales_the_fit(name):
    weight = torch.randn(20, 12, generator=torch.Generator().manual_seed(0))
    one, thousand = compress(make_method(name), weight, 200), compress(make_method(name), weight * 1024, 200)
    torch.testing.assert_close(dense(thousand), 1024 * dense(one))
    assert one.relative_error == pytest.approx(thousand.relative_error)


def test_a_zero_matrix_needs_no_triplets_under_any_kernel(kernel):
    method = make_method("nla")
    method.kernel = kernel
    fit = compress(method, torch.zeros(20, 12), 200)
    assert fit.n_params == 0 and fit.relative_error == 0 and not dense(fit).any() and "zero" in fit.status


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_is_an_error(name, bad):
    weight = torch.ones(4, 4)
    weight[2, 1] = bad
    with pytest.raises(NonFiniteError, match="weight"):
        compress(make_method(name), weight, 20)


def test_triplets_that_overflow_the_type_they_are_stored_in_are_an_error():
    with pytest.raises(NonFiniteError, match=r"overflow torch\.float16"):
        compress(SVD(), (torch.randn(40, 40, generator=torch.Generator().manual_seed(0)) * 1e4).half(), 800)


def test_svd_reaches_eckart_young_with_the_singular_values_as_mu():
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    fit = compress(SVD(), weight, 7 * 51)
    s = torch.linalg.svdvals(weight)
    ((_, triplets),) = fit.terms
    torch.testing.assert_close(triplets.mu, s[:7])
    assert fit.relative_error == pytest.approx(float(s[7:].square().sum() / s.square().sum()), rel=1e-4)
    assert fit.svd_error == pytest.approx(fit.relative_error, rel=1e-4) == fit.floor
    assert fit.n_params == 7 * 51


def test_the_svd_beside_a_fit_has_as_many_parameters():
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    fit = compress(make_method("nla"), weight, 7 * 51 + 50)
    assert fit.svd_error == pytest.approx(Spectrum(weight).tail(7))
