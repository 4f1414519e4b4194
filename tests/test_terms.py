"""Tests of terms: forward pass, count, bits and checkpoints; a new kind of term; and factors shared by several matrices."""

import json

import pytest
import torch
from torch import nn

from nla.budget.base import Target
from nla.budget.plan import make_plan
from nla.compressed.contents import count_bits, count_parameters, matrix_counts, replace_parameters
from nla.compressed.layer import CompressedLinear
from nla.compressed.surgery import swap
from nla.kernels.gaussian import Gaussian
from nla.kernels.linear import Linear
from nla.kernels.phase import Phase
from nla.machine.cache import Cache
from nla.machine.errors import UserError
from nla.matrix.inputs import Statistics
from nla.matrix.objective import Norms, Objective
from nla.matrix.triplets import Triplets, triplet_size
from nla.methods.base import Method
from nla.methods.fit import Fit, measured, squared_error_of
from nla.models.select import LinearSpec
from nla.retrain.dropping import drop_masked
from nla.retrain.trainable import chosen_parts, prepare_terms
from nla.solvers.base import Status
from nla.solvers.squared_error import squared_error, squared_error_alone
from nla.stages.fit_groups import load_fits, store_fits
from nla.terms.base import Stored, Sum, Term, class_path, shares
from nla.terms.kernel_term import KernelTerm
from nla.terms.state import empty_term, pack, unpack
from tests.conftest import TINY, configuration

CPU = torch.device("cpu")


def term_of(kernel, m=13, n=9, h=4, r=2, seed=0) -> KernelTerm:
    return KernelTerm(kernel, kernel.random_start(m, n, h, r, torch.Generator().manual_seed(seed)))


def two_terms(**sizes) -> Sum:
    return Sum([term_of(Linear(), **sizes), term_of(Phase(), **sizes, seed=1)])


def test_a_sum_computes_with_the_sum_of_its_matrices_and_counts_them_all():
    both = two_terms()
    x = torch.randn(2, 3, 9, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(both(x), x @ both.dense().T, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(both.dense(), both.summands[0].dense() + both.summands[1].dense())
    assert both.count() == 2 * 4 * triplet_size(13, 9, 2) and both.bits() == 32 * both.count()
    assert both.rank_bound() == 8 + 16 and both.describe() == "linear h=4 r=2 + phase h=4 r=2"
    assert Sum([both, term_of(Gaussian())]).rank_bound() is None


def test_masked_triplets_are_not_counted_and_not_stored(kernel):
    term = term_of(kernel, h=6)
    with torch.no_grad():
        term.mu[[0, 3]] = 0
    stored = term.as_stored(torch.bfloat16)
    assert term.count() == stored.count() == 4 * triplet_size(13, 9, 2) == stored.bits() // 16
    assert stored.triplets.h == 4
    torch.testing.assert_close(stored.dense().float(), term.dense(), rtol=0.1, atol=0.1 * float(term.dense().abs().max()))


def test_a_term_is_made_again_from_its_config_as_json_and_its_tensors(kernel):
    terms = {"a": term_of(kernel), "b": Sum([term_of(kernel, seed=1), term_of(Linear(), seed=2)])}
    tensors, info = pack(terms)
    again = unpack(tensors, json.loads(json.dumps(info)))
    for name, term in terms.items():
        assert torch.equal(again[name].dense(), term.dense()) and again[name].config() == term.config()
        empty = empty_term(term.config())
        assert empty.count() == term.count() and empty.bits() == term.bits()


@pytest.mark.parametrize(
    "path", ["os.system", "nla.kernels.phase.wrap", "nla.pipeline.run", "torch.nn.Linear", "nla.nothing.At"]
)
def test_a_checkpoint_that_names_another_class_is_refused(path):
    with pytest.raises((ValueError, ModuleNotFoundError)):
        empty_term({"class": path})


@pytest.mark.parametrize("kernels", [(Linear(), Phase()), (Linear(), Gaussian()), (Gaussian(), Phase(), Gaussian(sigma=0.5))])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_squared_error_of_a_sum_and_its_gradient_are_those_of_its_dense_matrix(kernels, weighted):
    from nla.matrix.objective import Factor

    generator = torch.Generator().manual_seed(0)
    triplets = [k.random_start(11, 7, 3, 2, generator).map(lambda p: p.double().requires_grad_()) for k in kernels]
    weight, S = torch.randn(11, 7, generator=generator).double(), torch.randn(7, 7, generator=generator).double()
    objective = Objective(weight, Factor(S) if weighted else None)
    loss, found = squared_error(kernels, triplets, objective, torch.float64)
    error = sum(k.dense(t) for k, t in zip(kernels, triplets, strict=True)) - weight
    expected = error.square().sum() if not weighted else (error @ S).square().sum() * len(S) / S.square().sum()
    torch.testing.assert_close(loss, expected.detach())
    torch.testing.assert_close(squared_error_alone(kernels, triplets, objective, torch.float64), loss)
    wanted = torch.autograd.grad(expected, [p for t in triplets for p in t.tensors])
    for got, want in zip([p for t in found for p in t.tensors], wanted, strict=True):
        torch.testing.assert_close(got, want)


class Diagonal(Term):
    """A new kind of term: a diagonal matrix."""

    def __init__(self, diagonal: torch.Tensor) -> None:
        super().__init__()
        self.diagonal = nn.Parameter(diagonal.detach())
        self.out_features = self.in_features = len(diagonal)

    @classmethod
    def empty(cls, size: int) -> "Diagonal":
        return cls(torch.empty(size, device="meta"))

    def forward(self, x):
        return x * self.diagonal

    def dense(self):
        return torch.diag(self.diagonal)

    def stored(self):
        return [Stored(self.diagonal, len(self.diagonal), 8 * self.diagonal.nbytes)]

    def config(self):
        return {"class": class_path(self), "size": len(self.diagonal)}

    def describe(self):
        return "diagonal"

    def forward_flops(self, tokens):
        return tokens * len(self.diagonal)

    def dense_flops(self):
        return 0

    def scaled(self, factor):
        return Diagonal(self.diagonal * factor)

    def as_stored(self, dtype):
        return Diagonal(self.diagonal.to(dtype))


def test_a_term_of_a_new_kind_stands_in_a_model_is_counted_measured_and_trained():
    module = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3))
    dense = module[0].weight.detach()
    term = Sum([term_of(Linear(), 8, 8, 1, 1), Diagonal(torch.arange(8.0))])
    objective = Objective(dense)
    expected = (term.dense() - dense).square().sum()
    torch.testing.assert_close(squared_error_of(term, objective), expected)
    before = count_parameters(module)
    swap(module, {"0": term})
    saved = 64 - (8 + 17)
    assert count_parameters(module) == before - saved and count_bits(module) == 32 * (before - saved)
    x = torch.randn(5, 8)
    torch.testing.assert_close(module[0](x), x @ term.dense().T + module[0].bias, rtol=1e-4, atol=1e-5)
    assert {t.name for t in chosen_parts(module, ["everything"])} == {name for name, _ in module.named_parameters()}


class SharedRight(Method):
    """A method for tests: queries, keys and values of a layer share one right factor, the best for the three stacked."""

    shares_factors = True

    def groups(self, specs):
        together: dict[str, list[LinearSpec]] = {}
        for spec in specs:
            block, _, kind = spec.name.rpartition(".")
            together.setdefault(block if kind in ("q_proj", "k_proj", "v_proj") else spec.name, []).append(spec)
        return list(together.values())

    def ranks(self, shapes, bits, dtype):
        return bits // (8 * dtype.itemsize) // (sum(m + 1 for m, _ in shapes) + shapes[0][1])

    def plan(self, shapes, bits, dtype):
        h = self.ranks(shapes, bits, dtype)
        terms = [KernelTerm.empty(Linear(), m, n, h, 1, dtype) for m, n in shapes]
        for term in terms[1:]:
            term.B = terms[0].B
        return terms

    def least_bits(self, shapes, dtype):
        return 8 * dtype.itemsize * (sum(m + 1 for m, _ in shapes) + shapes[0][1])

    def compress(self, weights, bits, statistics, generator):
        h = self.ranks([tuple(w.shape) for w in weights], bits, weights[0].dtype)
        left, s, right = torch.linalg.svd(torch.cat(list(weights)).double(), full_matrices=False)
        shared = nn.Parameter(right[:h].T[:, :, None].to(weights[0]))
        fits = []
        for weight, part in zip(weights, (left[:, :h] * s[:h]).split([len(w) for w in weights]), strict=True):
            term = KernelTerm(Linear(), Triplets(part[:, :, None].to(weight), shared, torch.ones(h)))
            term.B = shared
            errors = measured(Norms(weight, Statistics()), term, 1.0, 1)
            figures = dict.fromkeys(("steps", "flops", "seconds", "peak_bytes", "n_params", "bits"), 0)
            fits.append(Fit(term=term, status=Status.OPTIMAL.code, losses=[], optimum=None, **errors, **figures))
        return fits


SHAPES = {"q_proj": (16, 12), "k_proj": (8, 12), "v_proj": (8, 12), "o_proj": (12, 16)}


@pytest.fixture
def attention() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({name: nn.Linear(n, m, bias=False) for name, (m, n) in SHAPES.items()})


def shared_fits(module: nn.Module) -> dict[str, Fit]:
    specs = [LinearSpec(name, m, n) for name, (m, n) in SHAPES.items()]
    target = Target(16.0, 32, "bits=16.0")
    plan = make_plan(specs, target, {s.name: 16 * s.n_params for s in specs}, SharedRight(), torch.float32)
    assert [[m.spec.name for m in group.matrices] for group in plan.groups] == [["q_proj", "k_proj", "v_proj"], ["o_proj"]]
    fits = {}
    for group in plan.groups:
        weights = [module[m.spec.name].weight.detach() for m in group.matrices]
        names = [m.spec.name for m in group.matrices]
        fits |= dict(zip(names, SharedRight().compress(weights, group.bits, [Statistics()] * 3, None), strict=True))
        assert sum(n for n, _ in shares([m.term for m in group.matrices])) == sum(
            n for n, _ in shares([fits[n].term for n in names])
        )
    assert sum(plan.kept.values()) <= 0.5 * plan.selected
    return fits


def test_a_factor_that_three_matrices_share_is_counted_once_and_stays_shared(attention, tmp_path):
    fits = shared_fits(attention)
    h = fits["q_proj"].term.triplets.h
    stacked = torch.cat([attention[name].weight for name in ("q_proj", "k_proj", "v_proj")]).detach().double()
    tail = torch.linalg.svdvals(stacked)[h:].square().sum()
    swap(attention, {name: fit.term for name, fit in fits.items()})
    lost = sum(
        (attention[n].term.dense() - w).square().sum()
        for n, w in zip(("q_proj", "k_proj", "v_proj"), stacked.float().split([16, 8, 8]), strict=True)
    )
    assert float(lost) == pytest.approx(float(tail), rel=1e-4)  # Eckart-Young for the three stacked
    counts = matrix_counts(attention)
    assert [counts[n][0] for n in ("q_proj", "k_proj", "v_proj")] == [h * (16 + 12 + 1), h * (8 + 1), h * (8 + 1)]
    assert count_parameters(attention) == sum(numbers for numbers, _ in counts.values())

    cache = Cache(tmp_path)
    store_fits(cache, "key", list(fits.values()))
    q, k, v, _ = (fit.term for fit in load_fits(cache, "key", CPU))
    assert q.B is k.B is v.B and torch.equal(q.dense(), fits["q_proj"].term.dense())

    prepare_terms(attention, 1, seed=0)
    trained = {t.name for t in chosen_parts(attention, ["B"])}
    assert {"q_proj.term.terms.0.B", "k_proj.term.terms.1.B"} < trained and "k_proj.term.terms.0.B" not in trained
    replace_parameters(attention, {"q_proj.term.terms.0.B": torch.zeros(12, h, 1)})
    drop_masked(attention)
    assert attention["k_proj"].term.summands[0].B is attention["q_proj"].term.summands[0].B
    assert not attention["v_proj"].term.summands[0].dense().any()


def test_a_method_that_shares_factors_runs_end_to_end(run_here, tmp_path, monkeypatch):
    import tests.test_terms as own
    from nla.harness import request

    build = request.build
    monkeypatch.setattr(
        request, "build", lambda group, node, *rest: own.SharedRight() if group == "method" else build(group, node, *rest)
    )
    sequential = type("Sequential", (own.SharedRight,), {"sequential": True})
    with pytest.raises(UserError, match="layers share factors"), monkeypatch.context() as patch:
        patch.setattr(own, "SharedRight", sequential)
        run_here(*TINY, "ratio=0.5")
    record = run_here(*TINY, "ratio=0.5", "retrain.steps=2", "retrain.length=32", "retrain.watch=0")
    assert record.status == "done" and record.parameters.ratio >= 0.5
    assert sum(fit.n_params for fit in record.fits) == record.parameters.selected_after


def test_a_compressed_layer_adds_its_bias_and_becomes_the_dense_layer_of_the_same_matrix():
    layer = CompressedLinear(two_terms(), nn.Parameter(torch.arange(13.0)))
    x = torch.randn(4, 9)
    torch.testing.assert_close(layer(x), layer.dense()(x), rtol=1e-4, atol=1e-4)


def test_bits_say_the_same_as_a_ratio(run_here, tmp_path):
    half = run_here(*TINY, "ratio=0.5", "method=svd")
    again = run_here(*TINY, "bits=16", "method=svd")
    assert [fit.n_params for fit in half.fits] == [fit.n_params for fit in again.fits]
    low = run_here(*TINY, "bits=4", "method=svd", "dtype=bfloat16")
    selected = sum(fit.shape[0] * fit.shape[1] for fit in low.fits)
    assert sum(fit.bits for fit in low.fits) <= 4 * selected
    assert configuration("bits=2").ratio is None
