"""Tests of every kernel of conf/kernel: formula, forward pass, gradients, memory and parameter count."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from nla.compressed.layer import CompressedLinear
from nla.kernels.base import Kernel
from nla.kernels.spline import Spline
from nla.machine.peak_memory import PeakMemory
from nla.matrix.objective import Factor, Objective
from nla.matrix.triplets import Triplets, triplet_size
from nla.solvers.squared_error import squared_error
from nla.terms.kernel_term import KernelTerm
from tests.conftest import KERNELS, make_kernel

CPU = torch.device("cpu")


def draw_triplets(kernel, m, n, h, r, seed=0, dtype=torch.float64) -> Triplets:
    generator = torch.Generator().manual_seed(seed)
    return kernel.random_start(m, n, h, r, generator).map(lambda p: p.to(dtype).requires_grad_())


class Laplacian(Kernel):
    """W'[i, j] = sum_l mu_l exp(-||A_il - B_jl||_1): a kernel that defines only its formula."""

    def entry(self, a, b):
        return (-(a - b).abs().sum(-1)).exp()


ALL = {name: make_kernel(*overrides) for name, overrides in KERNELS.items()} | {"laplacian": Laplacian(r=2)}
sizes = st.tuples(st.integers(1, 9), st.integers(1, 9), st.integers(1, 4), st.integers(1, 12))


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=25, deadline=None)
@given(size=sizes, seed=st.integers(0, 99))
def test_apply_is_multiplication_by_dense_with_the_same_gradients(name, size, seed):
    kernel = ALL[name]
    t = draw_triplets(kernel, *size, seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, size[1], dtype=torch.float64, generator=generator, requires_grad=True)
    d_y = torch.randn(2, 3, size[0], dtype=torch.float64, generator=generator)
    inputs = (x, t.A, t.B, t.mu)

    y, expected = kernel.apply(t, x), x @ kernel.dense(t).T
    torch.testing.assert_close(y, expected)
    for got, want in zip(torch.autograd.grad(y, inputs, d_y), torch.autograd.grad(expected, inputs, d_y), strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ALL)
def test_apply_under_autocast_gives_nearly_the_same_output_and_gradients(name):
    """Inputs in fp32 or, behind another layer, in bf16."""
    kernel = ALL[name]
    t = draw_triplets(kernel, 9, 7, 2, 3, seed=1).map(lambda p: p.detach().float().requires_grad_())
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        expected = kernel.apply(t, x.float())
        with torch.autocast("cpu", torch.bfloat16):
            y = kernel.apply(t, x)
        for got, want in zip(grads(y, x, t), grads(expected, x, t), strict=True):
            torch.testing.assert_close(got.float(), want.float(), rtol=0.05, atol=0.05 * float(want.abs().max()))
        torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05 * float(expected.detach().abs().max()))


def grads(y: torch.Tensor, x: torch.Tensor, t: Triplets) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(y.float().square().sum(), (x, *t.tensors))


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=25, deadline=None)
@given(size=sizes, seed=st.integers(0, 99), weighted=st.booleans())
def test_squared_error_and_its_gradient_are_those_of_dense(name, size, seed, weighted):
    kernel = ALL[name]
    t = draw_triplets(kernel, *size, seed)
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(size[0], size[1], dtype=torch.float64, generator=generator)
    S = torch.randn(size[1], size[1], dtype=torch.float64, generator=generator)
    objective = Objective(weight, Factor(S) if weighted else None)

    loss, (found,) = squared_error([kernel], [t], objective, torch.float64)
    error = kernel.dense(t) - weight
    expected = ((error @ S) if weighted else error).square().sum()
    expected = expected * (len(S) / S.square().sum() if weighted else 1)  # the objective scales S
    torch.testing.assert_close(loss, expected.detach())
    wanted = torch.autograd.grad(expected, (t.A, t.B, t.mu))
    for got, want in zip(found.tensors, wanted, strict=True):
        torch.testing.assert_close(got, want)


@pytest.mark.parametrize("name", ALL)
@settings(max_examples=25, deadline=None)
@given(size=sizes, seed=st.integers(0, 99))
def test_every_entry_of_dense_is_the_formula_of_its_two_rows(name, size, seed):
    """The expected matrix is computed by a loop over rows and triplets that calls only `entry`; its gradient by autograd."""
    kernel, (m, n, h, _) = ALL[name], size
    t = draw_triplets(kernel, *size, seed)
    expected = torch.stack(
        [torch.stack([sum(t.mu[k] * kernel.entry(t.A[i, k], t.B[j, k]) for k in range(h)) for j in range(n)]) for i in range(m)]
    )
    dense = kernel.dense(t)
    torch.testing.assert_close(dense, expected)
    d = torch.randn(m, n, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for got, want in zip(gradient(dense, t, d), gradient(expected, t, d), strict=True):
        torch.testing.assert_close(got, want)


def gradient(matrix: torch.Tensor, t: Triplets, d: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return torch.autograd.grad(matrix, t.tensors, d)


@pytest.mark.parametrize(
    ("name", "a", "b", "value"),
    [
        ("piecewise", [1.0, 2.0], [3.0, 5.0], 13.0),
        ("linear", [1.0, 2.0], [3.0, 5.0], 13.0),
        ("distance", [1.0, 2.0], [4.0, 6.0], 5.0),
        ("gaussian", [1.0, 2.0], [2.0, 3.0], math.exp(-1)),
        ("sigmoid", [1.0, 2.0], [-2.0, 1.0], 0.5),
        ("polynomial", [1.0, 2.0], [3.0, -1.0], 4.0),
        ("phase", [1.0, 2.0], [1.0, 2.0 + math.pi], 0.0),
        ("spline", [0.0, 0.0], [0.5, 0.0], 0.5 * 0.75),
    ],
)
def test_formulas_at_points_computed_by_hand(name, a, b, value):
    assert float(ALL[name].entry(torch.tensor(a), torch.tensor(b))) == pytest.approx(value, abs=1e-6)


@pytest.mark.parametrize(
    "degree, at", [(1, {0: 1, 0.5: 0.5, 1: 0}), (2, {0: 3 / 4, 0.5: 1 / 2, 1.5: 0}), (3, {0: 2 / 3, 1: 1 / 6, 2: 0})]
)
def test_b_splines_have_their_tabled_values_and_integer_shifts_add_up_to_one(degree, at):
    spline = Spline(degree)
    for d, value in at.items():
        assert float(spline.beta(torch.tensor([d, -d], dtype=torch.float64), degree)[1]) == pytest.approx(value, abs=1e-12)
    d = torch.linspace(-0.5, 0.5, 11, dtype=torch.float64)
    total = sum(spline.beta(d + shift, degree) for shift in range(-3, 4))
    torch.testing.assert_close(total, torch.ones_like(d))


@pytest.mark.parametrize("name", [name for name in ALL if name != "linear"])
def test_a_fitted_matrix_in_bf16_is_applied_as_precisely_as_a_linear_one(name):
    """The inputs have a mean and an outlier channel, as activations have. Self-terms would lose their precision in bf16."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(96, 128, generator=generator)
    x = (torch.randn(64, 128, generator=generator) + 0.5) * torch.ones(128).index_fill(0, torch.tensor(3), 20.0)

    def errors(kernel) -> tuple[float, float]:
        h, r = kernel.size(96, 128, 96 * 128 // 2)
        t = kernel.canonical(kernel.warm_start(Objective(weight), h, r, generator)[0]).map(torch.Tensor.bfloat16)
        wide = t.map(torch.Tensor.double)
        layer = CompressedLinear(KernelTerm(kernel, t), None)
        pairs = (
            (layer(x.bfloat16()).detach(), kernel.apply(wide, x.bfloat16().double())),
            (layer.dense().weight, kernel.dense(wide)),
        )
        assert all(rounded.dtype == torch.bfloat16 for rounded, _ in pairs)
        applied, dense = (float((rounded.double() - exact).norm() / exact.norm()) for rounded, exact in pairs)
        return applied, dense

    applied, dense = errors(ALL[name])
    assert applied < 4 * errors(ALL["linear"])[0]
    assert dense < 2**-8  # of rounding the exact matrix


def test_gradients_of_tiled_kernels_in_bf16_are_added_up_in_fp32():
    kernel = ALL["gaussian"]
    t = draw_triplets(kernel, 700, 64, 40, 1, dtype=torch.bfloat16)
    x = torch.randn(16, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    wide = t.map(lambda p: p.detach().float().requires_grad_())
    low = torch.autograd.grad(kernel.apply(t, x).float().square().sum(), (t.B, t.mu))
    exact = torch.autograd.grad(kernel.apply(wide, x.float()).square().sum(), (wide.B, wide.mu))
    for got, want in zip(low, exact, strict=True):
        assert (got.float() - want).norm() < 0.02 * want.norm()


def test_mu_scales_the_matrix_and_a_zero_mu_can_be_pruned(kernel):
    t = draw_triplets(kernel, 6, 5, 4, 2).map(torch.Tensor.detach)
    torch.testing.assert_close(kernel.dense(t.scaled(-3.0)), -3 * kernel.dense(t))
    masked = Triplets(t.A, t.B, t.mu * torch.tensor([1.0, 0.0, 1.0, 0.0]))
    pruned = masked.prune(masked.mu != 0)
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(kernel.apply(pruned, x), kernel.apply(masked, x))
    assert KernelTerm(kernel, pruned).count() == KernelTerm(kernel, masked).count() == 2 * triplet_size(6, 5, 2)


def test_without_triplets_the_matrix_is_zero(kernel):
    t = draw_triplets(kernel, 6, 5, 2, 2).map(torch.Tensor.detach)
    empty = t.prune(torch.zeros(2, dtype=torch.bool))
    assert not kernel.apply(empty, torch.ones(3, 5, dtype=torch.float64)).any()


@pytest.mark.parametrize("name", ALL)
@given(m=st.integers(1, 300), n=st.integers(1, 300), budget=st.integers(1, 60_000))
def test_size_spends_the_budget_to_less_than_one_triplet(name, m, n, budget):
    h, r = ALL[name].size(m, n, budget)
    one = triplet_size(m, n, r)
    assert h * one <= budget < (h + 1) * one
    assert 1 <= r <= ALL[name].r


def test_the_papers_sizes_are_met_and_small_matrices_waste_nothing():
    piecewise = ALL["piecewise"]
    sizes_of_the_paper = [piecewise.size(4096, 4096, int(keep * 4096 * 4096)) for keep in (0.5, 0.4, 0.3)]
    assert sizes_of_the_paper == [(51, 20), (40, 20), (30, 20)]
    for m, n in ((192, 576), (576, 576), (576, 1536)):
        h, r = piecewise.size(m, n, int(0.5 * m * n))
        assert h >= 30 and h * r == int(0.5 * m * n) // (m + n + 1)


def test_rank_never_exceeds_the_bound_by_which_the_floor_is_computed(kernel):
    bound = kernel.rank_bound(3, 2)
    if bound is not None:
        t = draw_triplets(kernel, 30, 25, 3, 2).map(torch.Tensor.detach)
        assert torch.linalg.matrix_rank(kernel.dense(t)) <= bound


def test_forward_and_backward_never_hold_a_dense_matrix(kernel):
    m = n = 2048
    t = draw_triplets(kernel, m, n, 2, 1, dtype=torch.float32)
    x = torch.randn(4, n, requires_grad=True)
    with PeakMemory(CPU) as memory:
        kernel.apply(t, x).sum().backward()
    assert memory.peak_bytes < 4 * m * n / 2


def test_piecewise_needs_at_most_15_percent_of_the_reconstructing_forms_memory():
    """4096 x 4096 at 70 %, 512 tokens; without outputs and gradients, which every form needs."""
    kernel = ALL["piecewise"]
    m = n = 4096
    h, r = kernel.size(m, n, int(0.3 * m * n))
    assert (h, r) == (30, 20)
    t = draw_triplets(kernel, m, n, h, r, dtype=torch.float32)
    x = torch.randn(512, n, requires_grad=True)
    results = 4 * (512 * m + x.numel() + t.A.numel() + t.B.numel() + t.mu.numel())

    def extra(forward) -> int:
        with PeakMemory(CPU) as memory:
            y = forward()
            torch.autograd.grad(y, (x, t.A, t.B, t.mu), torch.ones_like(y))
        return memory.peak_bytes - results

    assert extra(lambda: kernel.apply(t, x)) <= 0.15 * extra(lambda: x @ kernel.dense(t).T)


@pytest.mark.parametrize("tokens", [1, 6, 400])
@pytest.mark.parametrize("h", [2, 30])
@pytest.mark.parametrize("name", ["linear", "phase", "harmonic"])
def test_thin_factors_take_as_many_operations_as_they_say_and_no_more_than_both_ways(name, h, tokens):
    kernel, m, n = ALL[name], 40, 24
    t, x = draw_triplets(kernel, m, n, h, 1), torch.ones(tokens, n, dtype=torch.float64)
    with FlopCounterMode(display=False) as counter:
        kernel.apply(t, x)
    rank = kernel.columns(h, 1)
    assert counter.get_total_flops() == kernel.forward_flops(m, n, h, 1, tokens)
    assert counter.get_total_flops() == min(2 * tokens * rank * (m + n), 2 * m * n * (rank + tokens))


def test_a_warm_start_is_finite_for_any_matrix(kernel):
    generator = torch.Generator().manual_seed(0)
    rank_one = torch.ones(7, 1) @ torch.arange(1.0, 6.0)[None]
    for weight in (torch.randn(7, 5), torch.randn(2, 9), rank_one, torch.eye(3), torch.ones(1, 1)):
        for h, r in ((1, 1), (2, 3), (12, 1)):
            t, _ = kernel.warm_start(Objective(weight), h, r, generator)
            assert (t.h, t.r) == (h, r)
            assert all(bool(torch.isfinite(p).all()) for p in (t.A, t.B, t.mu))
