"""Scales of rows and columns around a term, and the fits of triplets with scales and of linear factors beside them."""

import functools

import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st

from nla.compressed.contents import matrix_terms
from nla.kernels.linear import Linear
from nla.kernels.phase import Phase
from nla.kernels.piecewise import Piecewise
from nla.machine.errors import UserError
from nla.matrix.inputs import Statistics
from nla.matrix.objective import Objective, whitening
from nla.matrix.triplets import triplet_size
from nla.solvers.base import Start
from nla.solvers.factored import descend_factored
from nla.solvers.squared_error import of_product
from nla.solvers.triplets import descend_triplets
from nla.storage.base import FloatAndScales
from nla.terms.base import Sum
from nla.terms.kernel_term import KernelTerm
from nla.terms.scaled import Scaled
from nla.terms.state import pack, unpack
from tests.conftest import TINY, composed
from tests.samples import normal
from tests.test_solvers import make_solver


def scaled_term(kernel, m: int, n: int, h: int, seed: int = 0) -> Scaled:
    triplets = kernel.random_start(m, n, h, kernel.r, torch.Generator().manual_seed(seed))
    return Scaled(KernelTerm(kernel, triplets), *(normal(k, seed=seed + 1).exp() for k in (m, n)))


@settings(max_examples=30, deadline=None)
@given(m=st.integers(1, 12), n=st.integers(1, 12), h=st.integers(1, 15))
def test_the_matrix_is_that_of_the_inner_term_times_both_scales(m, n, h):
    for kernel in (Phase(), Piecewise(r=2), Linear()):
        term, x = scaled_term(kernel, m, n, h), normal(2, 3, n, seed=5)
        matrix = torch.diag(term.rows) @ term.inner.dense() @ torch.diag(term.columns)
        torch.testing.assert_close(term.dense(), matrix)
        torch.testing.assert_close(term(x), x @ matrix.T, rtol=1e-3, atol=1e-3 * float(matrix.norm()))
        left, right = term.wide_factors()
        torch.testing.assert_close((left @ right.T).float(), matrix, rtol=1e-3, atol=1e-4 * float(matrix.abs().max()))


def test_scales_are_counted_stored_and_restored():
    term = scaled_term(Phase(), 7, 5, 3)
    assert term.count() == 3 * triplet_size(7, 5, 1) + 12 and term.bits() == 32 * term.count()
    assert term.rank_bound() == 6 and term.describe() == "phase h=3 r=1 scaled"
    assert term.forward_flops(4) == term.inner.forward_flops(4) + 4 * 12
    kept = term.as_stored(torch.bfloat16)
    restored = unpack(*pack({"fc": kept}))["fc"]
    assert torch.equal(restored.dense(), kept.dense()) and restored.bits() == kept.bits() == 16 * term.count()
    torch.testing.assert_close(term.scaled(-2.0).dense(), -2 * term.dense())


def test_a_preconditioned_gradient_is_the_plain_one_divided_by_the_damped_gram_matrix():
    m, n, k, damping = 7, 5, 3, 0.5
    inputs = normal(50, n, seed=2) * torch.tensor([9.0, 1.0, 1.0, 0.1, 0.01])
    objective, left, right = Objective(normal(m, n), whitening(inputs.T @ inputs)), normal(m, k, seed=3), normal(n, k, seed=4)
    gram = inputs.T @ inputs * (n / inputs.square().sum())  # with a mean diagonal of 1
    right.requires_grad_()
    difference = left @ right.T - objective.weight
    (plain,) = torch.autograd.grad(((difference @ gram) * difference).sum(), right)
    expected = torch.linalg.solve(gram + damping * torch.eye(n), plain)
    found = of_product(left, right.detach(), objective, torch.float32, objective.preconditioned(damping))
    torch.testing.assert_close(found[2], expected, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(found[1], 2 * difference.detach() @ gram @ right.detach(), rtol=1e-3, atol=1e-4)
    assert Objective(normal(m, n)).preconditioned(damping) is None  # the plain norm has nothing to divide by


def test_a_damping_that_is_not_positive_is_refused_by_its_name():
    with pytest.raises(UserError, match=r"storage\.damping=0.*must be"):
        FloatAndScales(0)


def method(*asked: str):
    return instantiate(composed(*asked, "solver.steps=150", "solver.products=float32").method, _convert_="all")


def test_scales_let_bounded_values_have_rows_and_columns_of_any_size():
    target = scaled_term(Phase(), 40, 30, 4, seed=3).dense().detach()
    statistics, numbers = Statistics(gram=torch.eye(30)), 6 * triplet_size(40, 30, 1)
    errors = {}
    for storage in ("float", "scaled"):
        asked = method("method=nla_outputs", "kernel=phase", f"storage={storage}", "method.fallback=null")
        (fit,) = asked.compress([target], 32 * numbers, [statistics], torch.Generator().manual_seed(0))
        errors[storage] = fit.weighted_error
        assert fit.n_params <= numbers
    assert errors["scaled"] < 0.5 * errors["float"]


@pytest.mark.parametrize("storage", ["float", "scaled"])
def test_fused_and_plain_optimisers_fit_a_sum_alike(storage):
    # Gradients of the factors of a sum are views of one matrix. A fused optimiser reads them in memory order.
    objective = Objective(normal(24, 20), whitening(torch.eye(20)))
    losses = []
    for fused in (True, False):
        optimiser = functools.partial(torch.optim.Adam, fused=fused)
        solver = make_solver(steps=30, patience=1000)
        solver.optimiser = optimiser
        first = solver.begin(Linear(), objective, 3, 1, torch.Generator().manual_seed(0)).term
        second = KernelTerm(Phase(), Phase().mixed_start(objective, 4, 1, torch.Generator().manual_seed(0)))
        if storage == "float":
            solution = descend_triplets(solver, Start(Sum([first, second])), objective)
        else:
            both = Sum([first, Scaled(second, torch.ones(24), torch.ones(20))])
            solution = descend_factored(solver, Start(both), objective)
        losses.append([loss for _, loss in solution.losses])
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)


@pytest.mark.parametrize(
    "asked",
    [["method=hybrid"], ["method=hybrid", "kernel=phase"], ["method=nla_outputs", "kernel=phase", "storage=scaled"]],
)
def test_a_run_refines_retrains_drops_triplets_saves_and_loads_scaled_terms(run_here, tmp_path, asked):
    import nla

    asked = [
        *asked,
        "method.fallback=null",
        "select.include='q_proj|up_proj'",
        "statistics.windows=40",
        "statistics.length=32",
        "solver.steps=5",
        "refine=block",
        "refine.epochs=1",
        "budget=adaptive",
        "ratio=0.6",
        "retrain.steps=4",
    ]
    folder = tmp_path / "kept"
    record = run_here(*TINY, *asked, "retrain.length=64", "schedule.t_f=0.5", "schedule.interval=1", f"save={folder}")
    loaded = matrix_terms(nla.load_compressed(folder))
    scaled = [part for term in loaded.values() for part in term.modules() if isinstance(part, Scaled)]
    weights = sum(term.out_features * term.in_features for term in loaded.values())
    assert scaled and sum(term.count() for term in loaded.values()) <= 0.4 * weights
    assert record.bits.selected_per_weight == pytest.approx(sum(term.bits() for term in loaded.values()) / weights)
