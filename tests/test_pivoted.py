"""Tests of matrices that are stored by pivot rows."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from nla.compressed.surgery import swap
from nla.kernels.linear import Linear
from nla.matrix.triplets import Triplets, triplet_size
from nla.saved import convert
from nla.saved.convert import pivot
from nla.terms.base import Sum
from nla.terms.kernel_term import KernelTerm, nothing
from nla.terms.pivoted import pivoted
from nla.terms.state import empty_term
from tests import samples
from tests.conftest import make_kernel

normal = partial(samples.normal, dtype=torch.float64)


@settings(deadline=None)
@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 8), st.integers(0, 3))
def test_any_matrix_of_low_rank_is_its_pivot_rows_and_coefficients(m, n, k, lost):
    left, right = normal(m, k), normal(n, k, seed=1)
    left[:, : min(lost, k)] = 0
    matrix, term = left @ right.T, pivoted(left, right)
    rank = int(torch.linalg.matrix_rank(matrix)) if matrix.any() else 0
    torch.testing.assert_close(term.dense(), matrix, rtol=1e-9, atol=1e-9)
    assert term.count() == rank * (m + n - rank) and term.bits() == 64 * term.count() + 32 * rank
    x = normal(2, 3, n, seed=2)
    torch.testing.assert_close(term(x), x @ matrix.T, rtol=1e-9, atol=1e-9)
    assert empty_term(term.config()).count() == term.count()


@pytest.mark.parametrize("kernel", ["linear", "piecewise", "phase"])
def test_the_thin_factors_of_a_term_make_its_matrix(kernel):
    generator = torch.Generator().manual_seed(0)
    terms = [KernelTerm(k, k.random_start(9, 7, 2, 2, generator)) for k in (make_kernel(f"kernel={kernel}"), Linear())]
    left, right = Sum(terms).wide_factors()
    torch.testing.assert_close((left @ right.T).float(), Sum(terms).dense(), rtol=1e-5, atol=1e-5)
    gaussian = make_kernel("kernel=gaussian")
    assert Sum([terms[0], KernelTerm(gaussian, gaussian.random_start(9, 7, 2, 2, generator))]).wide_factors() is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_a_square_matrix_needs_a_quarter_less_in_pivot_rows(dtype):
    module = nn.Sequential(nn.Linear(64, 64))
    A, B = normal(64, 32, 1).to(dtype), normal(64, 32, 1, seed=1).to(dtype)
    swap(module, {"0": KernelTerm(Linear(), Triplets(A, B, torch.ones(32, dtype=dtype)))})
    matrix = A.squeeze().double() @ B.squeeze().double().T
    (line,) = pivot(module)
    term = module[0].term
    assert term.count() == 32 * (64 + 64 - 32) == pytest.approx(0.75 * 32 * triplet_size(64, 64, 1), rel=0.01)
    error = float((term.as_stored(torch.float64).dense().detach() - matrix).norm() / matrix.norm())
    assert error < 4 * torch.finfo(dtype).eps and f"relative error {error:.1e}" in line


def test_terms_that_pivot_rows_would_not_keep_stay_as_they_are(monkeypatch):
    module = nn.Sequential(nn.Linear(64, 64))
    before = KernelTerm(Linear(), Triplets(normal(64, 32, 1).float(), normal(64, 32, 1, seed=1).float(), torch.ones(32)))
    swap(module, {"0": before})
    monkeypatch.setattr(convert, "LARGEST_ERROR", 1e-3)
    (line,) = pivot(module)
    assert module[0].term is before and "kept, because pivot rows with coefficients up to" in line
    phase = make_kernel("kernel=phase")
    wide = KernelTerm(phase, phase.random_start(8, 8, 3, 1, torch.Generator().manual_seed(0)))
    swap(module := nn.Sequential(nn.Linear(8, 8)), {"0": wide})  # rank 6 of 8 by 3 angles a row
    (line,) = pivot(module)
    assert module[0].term is wide and "would take" in line
    swap(module := nn.Sequential(nn.Linear(8, 8)), {"0": nothing(8, 8, torch.float32)})
    assert list(pivot(module)) == ["0: kept, because the matrix is zero"]


@pytest.mark.parametrize("shape", [(9, 7), (7, 9), (4, 9)])
def test_pivot_rows_are_trained_as_two_factors_of_one_size_and_lead_back(shape):
    stored = pivoted(normal(shape[0], 4), 30 * normal(shape[1], 4, seed=1))
    trained, x = stored.trainable(), normal(5, shape[1], seed=2)
    assert (trained.bits(), trained.config(), trained.rank_bound()) == (stored.bits(), stored.config(), 4)
    left, right = trained.factors()
    torch.testing.assert_close(left.T @ left, right.T @ right)
    torch.testing.assert_close(trained(x), stored(x))
    with torch.no_grad():
        trained.left += 0.1 * normal(shape[0], 4, seed=3)
    again = trained.packed()
    torch.testing.assert_close(again.dense(), trained.dense())
    assert not again.dense().allclose(stored.dense()) and again.config() == stored.config()
