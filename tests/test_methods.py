"""Tests of every method of conf/method: it keeps its budget, reports its true errors, and stores the weight's type."""

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from nla.kernels.linear import Linear
from nla.machine.errors import NonFiniteError
from nla.matrix.inputs import Statistics
from nla.matrix.objective import Objective
from nla.matrix.spectrum import Spectrum
from nla.matrix.triplets import triplet_size
from nla.methods.asvd import ASVD
from nla.methods.fwsvd import FWSVD
from nla.methods.svd import SVD
from nla.methods.svd_llm import SVDLLM
from nla.storage.base import Float
from nla.terms.kernel_term import KernelTerm
from nla.terms.state import pack, unpack
from tests.conftest import QUANTISED, configuration, options
from tests.samples import normal

METHODS = options("method")


def make_method(name: str):
    kernel = ["kernel=phase"] if name in ("nla", "nla_outputs") else []  # the others have no kernel, or bring one
    values = configuration(f"method={name}", *kernel, "solver.steps=5", "solver.products=float32")
    return instantiate(values.method, _convert_="all")


def known_inputs(size: int, tokens: int = 0, seed: int = 5) -> Statistics:
    """Statistics of `tokens` random inputs of different sizes, and random Fisher information."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens or 2 * size, size, generator=generator) * (0.1 + torch.rand(size, generator=generator))
    return Statistics(x.T @ x, x.abs().mean(0), torch.rand(size, generator=generator))


def compress(method, weight, n_params, seed=0, statistics=None):
    """The fit of one weight with a budget of n_params numbers of its type."""
    statistics = statistics or known_inputs(weight.shape[1])
    bits = n_params * 8 * weight.element_size()
    (fit,) = method.compress([weight], bits, [statistics], torch.Generator().manual_seed(seed))
    return fit


def dense(fit):
    return fit.term.double().dense().detach()


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=20, deadline=None)
@given(
    m=st.integers(1, 24),
    n=st.integers(1, 24),
    spare=st.integers(0, 400),
    kind=st.sampled_from(["full", "rank one", "zero"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@example(m=1, n=1, spare=0, kind="full", dtype=torch.float32)  # linear factors alone can be exact
def test_a_fit_keeps_its_budget_and_reports_its_true_error(name, m, n, spare, kind, dtype):
    weight = torch.randn(m, n, generator=torch.Generator().manual_seed(m * n))
    weight = {"full": weight, "rank one": weight[:, :1] @ weight[:1], "zero": 0 * weight}[kind].to(dtype)
    method = make_method(name)
    width = 8 * dtype.itemsize
    budget = -(-method.least_bits([(m, n)], dtype) // width) + spare
    fit = compress(method, weight, budget)
    assert fit.bits <= width * budget
    if name not in QUANTISED | {"pifa"}:  # which also stores the places of rows
        assert fit.bits == width * fit.n_params
    assert all(p.dtype == dtype for p in fit.term.parameters())
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
    assert fit.n_params == 0 and fit.relative_error == 0 and not dense(fit).any() and fit.status == "zero"


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
    torch.testing.assert_close(fit.term.mu.detach(), s[:7])
    assert fit.relative_error == pytest.approx(float(s[7:].square().sum() / s.square().sum()), rel=1e-4)
    assert fit.svd_error == pytest.approx(fit.relative_error, rel=1e-4) == fit.floor
    assert fit.n_params == 7 * 51


def test_pifa_is_the_matrix_of_svd_llm_of_the_rank_that_pivot_rows_have_room_for():
    weight, statistics = torch.randn(20, 12, generator=torch.Generator().manual_seed(0)), known_inputs(12)
    fit = compress(make_method("pifa"), weight, 182, statistics=statistics)
    assert fit.term.describe() == "pivoted rank=7"  # 7 (20 + 12 - 7) numbers of 32 bits, and 7 places of 32 bits, are 182
    assert (fit.n_params, fit.bits) == (175, 32 * 182)
    best = compress(make_method("svd_llm"), weight, 7 * 33, statistics=statistics)
    assert fit.weighted_error == pytest.approx(best.weighted_error, rel=1e-4)
    torch.testing.assert_close(dense(fit), dense(best), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shape", [(96, 288), (192, 96)])
def test_svd_stores_no_more_triplets_than_the_weights_rank(shape):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(shape[0], 10, generator=generator) @ torch.randn(10, shape[1], generator=generator)
    fit = compress(make_method("svd"), weight, weight.numel() // 2)
    assert fit.n_params == triplet_size(*shape, 1) * 10 and fit.relative_error < 1e-9


def test_the_svd_beside_a_fit_has_as_many_parameters():
    weight = torch.randn(20, 30, generator=torch.Generator().manual_seed(0))
    fit = compress(make_method("nla"), weight, 7 * 51 + 50)
    assert fit.svd_error == pytest.approx(Spectrum(weight).tail(7))


def matrix_and_inputs(m, n, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, n, generator=generator), known_inputs(n, seed=seed)


def outputs_error(fit, weight, x) -> float:
    """||(W' - W) x^T||^2 / ||W x^T||^2, computed from the inputs x (tokens, in)."""
    return float(((dense(fit) - weight.double()) @ x.T).square().sum() / (weight.double() @ x.T).square().sum())


@settings(max_examples=25, deadline=None)
@given(m=st.integers(2, 20), n=st.integers(2, 20), tokens=st.integers(1, 60), rank=st.integers(1, 6), seed=st.integers(0, 99))
def test_svd_llm_reaches_the_smallest_output_error_of_its_rank(m, n, tokens, rank, seed):
    """The smallest error follows from the SVD of W X^T (Eckart-Young), also if the inputs do not span all directions."""
    assume(rank * (m + n + 1) < m * n)  # with all its bits, a matrix stays dense
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(m, n, generator=generator)
    x = torch.randn(tokens, n, generator=generator).double() * torch.logspace(0, -2, n)
    fit = compress(SVDLLM(False, 0.0, Float()), weight, rank * (m + n + 1), statistics=Statistics(gram=(x.T @ x).float()))
    s = torch.linalg.svdvals(weight.double() @ x.T)
    best = float(s[rank:].square().sum() / s.square().sum())
    assert outputs_error(fit, weight, x) == pytest.approx(best, rel=1e-2, abs=1e-5)
    repair = 4e-6 * float(weight.square().sum() / s.square().sum())  # the error that repairing G may add
    assert fit.weighted_error == pytest.approx(best, rel=1e-2, abs=1e-5 + repair)
    assert fit.svd_llm_error == pytest.approx(fit.weighted_error, rel=1e-3, abs=1e-6) == fit.weighted_floor


def test_svd_llm_fits_float16_however_many_tokens_there_were_and_however_large_an_input_is():
    x = normal(600, 64, seed=3)
    x[:, 5] *= 1000
    weight = (0.02 * normal(256, 64)).half()
    few, many = (
        compress(SVDLLM(False, 0.0, Float()), weight, 8_000, statistics=Statistics(gram=t * x.T @ x)) for t in (1.0, 2.0**12)
    )
    assert torch.equal(few.term.dense(), many.term.dense())
    assert many.weighted_error == pytest.approx(many.svd_llm_error, rel=0.01)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_fwsvd_with_constant_fisher_information_and_asvd_with_alpha_0_are_svd(shape):
    weight, _ = matrix_and_inputs(*shape, 3)
    flat = Statistics(magnitude=torch.rand(shape[1]), fisher=torch.full((shape[1],), 0.3))
    svd = dense(compress(SVD(), weight, 200))
    for method in (FWSVD(), ASVD(alpha=0)):
        torch.testing.assert_close(dense(compress(method, weight, 200, statistics=flat)), svd, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", [(20, 12), (12, 20)])
def test_fwsvd_and_asvd_are_svd_of_the_scaled_weight_scaled_back(shape):
    """The expected result is computed by the published recipe, which inverts S; this code does not."""
    weight, statistics = matrix_and_inputs(*shape, 4)
    scales = {FWSVD(): statistics.fisher.sqrt(), ASVD(alpha=0.5): statistics.magnitude.sqrt() + 1e-6}
    for method, scale in scales.items():
        U, s, Vh = torch.linalg.svd(weight.double() * scale.double(), full_matrices=False)
        expected = (U[:, :6] * s[:6]) @ Vh[:6] / scale.double()
        torch.testing.assert_close(
            dense(compress(method, weight, 6 * 33, statistics=statistics)), expected, rtol=1e-4, atol=1e-5
        )


def test_an_input_without_fisher_information_is_not_looked_at_and_none_at_all_is_said():
    weight, _ = matrix_and_inputs(8, 6, 1)
    fisher = torch.tensor([1.0, 1, 1, 0, 0, 0])
    fit = compress(FWSVD(), weight, 3 * 15, statistics=Statistics(fisher=fisher))
    torch.testing.assert_close(dense(fit)[:, :3], weight[:, :3].double(), rtol=1e-4, atol=1e-5)
    none = compress(FWSVD(), weight, 3 * 15, statistics=Statistics(fisher=0 * fisher))
    assert none.status.startswith("optimal fisher")
    torch.testing.assert_close(dense(none), dense(compress(SVD(), weight, 3 * 15)))


def test_a_gram_matrix_that_is_not_positive_definite_is_repaired_and_says_so():
    weight, _ = matrix_and_inputs(8, 6, 2)
    x = torch.randn(3, 6, generator=torch.Generator().manual_seed(0))
    fit = compress(SVDLLM(False, 0.0, Float()), weight, 3 * 15, statistics=Statistics(gram=x.T @ x))
    assert fit.status.startswith("optimal gram+")
    assert outputs_error(fit, weight, x.double()) < 1e-5  # outputs of three tokens have rank three
    assert compress(SVDLLM(False, 0.0, Float()), weight, 3 * 15).status == "optimal"


@pytest.mark.parametrize("loss, error", [("weight", "relative_error"), ("activation", "weighted_error")])
def test_nla_makes_the_error_small_that_its_loss_names(loss, error):
    weight, statistics = matrix_and_inputs(24, 20, 6)
    values = {
        name: configuration("method=nla", "kernel=phase", f"method.loss={name}", "solver.products=float32")
        for name in ("weight", "activation")
    }
    fits = {
        name: compress(instantiate(v.method, _convert_="all"), weight, 300, statistics=statistics) for name, v in values.items()
    }
    other = "weight" if loss == "activation" else "activation"
    assert getattr(fits[loss], error) < getattr(fits[other], error)
    assert fits[loss].losses[-1][1] == pytest.approx(getattr(fits[loss], error), rel=0.01)


def test_the_weighted_optimum_stands_beside_a_fit_in_the_activation_norm():
    weight, statistics = matrix_and_inputs(24, 20, 7)
    values = configuration("method=nla", "kernel=linear", "method.loss=activation", "solver.products=float32")
    fit = compress(instantiate(values.method, _convert_="all"), weight, 300, statistics=statistics)
    best = compress(SVDLLM(False, 0.0, Float()), weight, 300, statistics=statistics)
    assert fit.weighted_error == pytest.approx(best.weighted_error, rel=1e-3)
    assert fit.svd_llm_error == pytest.approx(best.weighted_error, rel=1e-3) and fit.optimum == pytest.approx(
        fit.weighted_floor
    )


def test_a_fit_that_is_worse_than_linear_factors_is_replaced_by_them_if_asked():
    """One enormous entry: cosines of bounded size need many triplets for it, linear factors one."""
    weight = 0.01 * torch.randn(24, 16, generator=torch.Generator().manual_seed(0))
    weight[3, 5] = 100.0
    found = {}
    for fallback in ("null", "linear"):
        settings = [
            "kernel=phase",
            "method=nla_outputs",
            f"method.fallback={fallback}",
            "solver.steps=0",
            "solver.products=float32",
        ]
        method = instantiate(configuration(*settings).method)
        (found[fallback],) = method.compress(
            [weight], 200 * 32, [Statistics(gram=torch.eye(16))], torch.Generator().manual_seed(0)
        )
    assert found["null"].weighted_error > 2 * found["null"].svd_llm_error
    assert found["linear"].weighted_error == pytest.approx(found["linear"].svd_llm_error, rel=1e-3)
    assert found["linear"].status == "linear" and found["linear"].term.kernel.name == "linear"
    assert found["linear"].n_params <= 200


@pytest.mark.parametrize(("m", "n"), [(16, 40), (40, 16)])
def test_linear_factors_from_a_file_have_the_gradients_of_those_that_were_fitted_bit_for_bit(m, n):
    """A tensor that is stored column by column comes back row by row, and would be summed in another order."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(m, n, generator=generator), torch.randn(200, n, generator=generator)
    fitted = KernelTerm(Linear(), Linear().warm_start(Objective(weight), 12, 1, generator)[0])
    tensors, info = pack({"w": fitted})
    loaded = unpack({name: tensor.contiguous() for name, tensor in tensors.items()}, info)["w"]
    found = [torch.autograd.grad(term(x).square().sum(), list(term.parameters())) for term in (fitted, loaded)]
    assert all(map(torch.equal, *found))


def test_a_fit_that_is_better_than_linear_factors_stays():
    angles = torch.rand(2, 24, generator=torch.Generator().manual_seed(0)) * 6
    weight = torch.cos(angles[0][:, None] - angles[1][None, :16])  # rank 2 with the parameters of rank 1
    method = instantiate(configuration("kernel=phase", "method=nla_outputs", "solver.products=float32").method)
    (fit,) = method.compress([weight], 41 * 32, [Statistics(gram=torch.eye(16))], torch.Generator().manual_seed(0))
    assert fit.weighted_error < 0.1 * fit.svd_llm_error and fit.term.kernel.name == "phase"
