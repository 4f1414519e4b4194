"""Ranks go where they lower the expected loss most for each number that they cost."""

import itertools
import re
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate

from nla.budget.base import Target
from nla.budget.marginal import gain_of_each_rank, gradient_of_outputs, offers
from nla.matrix.inputs import Statistics
from nla.matrix.objective import Norms
from nla.matrix.triplets import triplet_size
from nla.models.select import LinearSpec
from nla.statistics.fisher import fisher
from tests.conftest import configuration
from tests.test_plan import of_values
from tests.test_statistics import tiny

SPECS = [LinearSpec("q", 12, 8), LinearSpec("k", 12, 8), LinearSpec("v", 12, 8)]
COST = triplet_size(12, 8, 1)


def view(weights, fishers=(1.0, 1.0, 1.0)):
    """Matrices by name whose inputs are white and whose outputs have these squared gradients."""
    known = {
        spec.name: Norms(weight, Statistics(gram=torch.eye(8), fisher=torch.full((8,), value)))
        for spec, weight, value in zip(SPECS, weights, fishers, strict=True)
    }
    return SimpleNamespace(norms=known.__getitem__)


def shares(target, found, emphasis=1.0, least=0.0):
    settings = f"budget.emphasis={emphasis}", f"budget.least={least}"
    return instantiate(configuration("budget=marginal", *settings).budget).look(SPECS, target, found)


def of_ranks(count):
    return Target(count * COST * 32 / sum(s.n_params for s in SPECS) + 1e-6, 32, "")


@pytest.mark.parametrize("fishers", [(1.0, 1.0, 1.0), (1.0, 20.0, 0.1)])
def test_no_other_ranks_within_the_budget_have_a_smaller_expected_loss(fishers):
    values = [[5.0, 1.0, 0.3, 0.1], [2.0, 1.9, 1.8, 0.2], [4.0, 3.0, 2.5, 0.9]]
    weights = [of_values(12, 8, v, seed=i) for i, v in enumerate(values)]
    found = [bits // (32 * COST) for bits in shares(of_ranks(6), view(weights, fishers)).values()]

    def expected(ranks):
        return sum(f * sum(x**2 for x in v[r:]) for f, v, r in zip(fishers, values, ranks, strict=True))

    allowed = [ranks for ranks in itertools.product(range(1, 5), repeat=3) if sum(ranks) <= 6]
    assert sum(found) == 6
    assert expected(found) == pytest.approx(min(map(expected, allowed)))


def test_no_other_shares_have_a_smaller_expected_loss_where_matrices_can_stay_dense():
    values = [[3.0] * 8, [2.0, 1.9, 1.8, 0.2], [4.0, 3.0, 2.5, 2.4, 2.3]]
    found = shares(of_ranks(8), view([of_values(12, 8, v, seed=i) for i, v in enumerate(values)]))
    spent = [bits // 32 for bits in found.values()]
    assert spent[0] == 12 * 8  # a flat spectrum: ranks would cost more
    options = [*((rank * COST, rank) for rank in range(1, 5)), (12 * 8, 8)]

    def loss(chosen):
        return sum(sum(x**2 for x in v[dict(options)[numbers] :]) for v, numbers in zip(values, chosen, strict=True))

    allowed = [chosen for chosen in itertools.product(dict(options), repeat=3) if sum(chosen) <= 8 * COST]
    assert sum(spent) <= 8 * COST and loss(spent) == pytest.approx(min(map(loss, allowed)))


def test_offers_fall_and_lead_to_the_dense_matrix():
    gains = torch.tensor([5.0, 4.0, 3.9, 3.8, 3.7, 3.6, 3.5, 3.4], dtype=torch.float64)
    found, instead = offers(12, 8, gains, 0)
    assert [offer.numbers for offer in found] == [COST, 12 * 8 - COST]  # the other 7 ranks are cheaper together
    assert [offer.numbers for offer in instead] == [COST] * 3  # up to 4 ranks take fewer numbers than the dense matrix
    assert found[1].rate == pytest.approx(float(gains[1:].sum()) / (12 * 8 - COST))
    falling, _ = offers(12, 8, 0.1 ** torch.arange(8.0), 0)
    rates = [offer.rate for offer in falling]
    assert rates == sorted(rates, reverse=True) and sum(offer.numbers for offer in falling) == 12 * 8
    assert [offer.numbers for offer in offers(1, 3, torch.ones(1), 0)[0]] == [5]  # larger than the dense matrix


@pytest.mark.parametrize("ranks", range(1, 5))
def test_a_matrix_that_cannot_become_dense_takes_single_ranks_and_no_numbers_are_left(ranks):
    flat = view([of_values(12, 8, [3.0] * 8, seed=i) for i in range(3)])  # from the first rank on, dense is the best offer
    (only,) = (
        instantiate(configuration("budget=marginal").budget)
        .look(SPECS[:1], Target(ranks * COST / 3 + 1e-6, 32, ""), flat)
        .values()
    )
    assert only == 32 * ranks * COST


def test_every_matrix_gets_a_rank_and_none_more_than_its_dense_size():
    weights = [of_values(12, 8, [9.0] * 8, seed=0), torch.zeros(12, 8), of_values(12, 8, [1e-3], seed=2)]
    found = shares(of_ranks(9), view(weights))
    assert min(found.values()) == 32 * COST
    assert max(shares(of_ranks(13), view(weights)).values()) <= 32 * 12 * 8


def test_the_gradient_is_that_of_the_loss_with_respect_to_the_layers_outputs(tmp_path):
    """For samples of one token each, the Fisher information over the inputs' squared size is the squared gradient, exactly."""
    model, layers, samples = tiny("tiny_opt", tmp_path, count=1)
    name = layers[-1]
    information = fisher(model, [name], samples)[name]
    layer, caught = model.module.get_submodule(name), {}

    def keep(module, arguments, output):
        output.retain_grad()
        caught["x"], caught["y"] = arguments[0].detach().flatten(0, -2), output

    layer.register_forward_hook(keep)
    model.module.zero_grad()
    model.loss(samples[0]).backward()
    x, g = caught["x"], caught["y"].grad.flatten(0, -2)
    by_hand = (g.T @ x).square().sum(0)
    torch.testing.assert_close(information, by_hand, rtol=1e-4, atol=1e-12)
    token = int(x.square().sum(1).argmax())
    one = Statistics(gram=torch.outer(x[token], x[token]), fisher=(torch.outer(g[token], x[token])).square().sum(0))
    gains = gain_of_each_rank(Norms(layer.weight.detach(), one), 1.0)
    output = (layer.weight.detach() @ x[token]).square().sum()
    assert float(gains.sum()) == pytest.approx(float(g[token].square().sum() * output) / len(g[token]), rel=1e-3)


def test_it_runs_and_stays_within_the_ratio(run_here):
    arguments = ["model=tiny_llama", "task.window=64", "task.max_windows=1", "track=none", "statistics.windows=8"]
    record = run_here(*arguments, "statistics.length=32", "method=svd_llm", "budget=marginal", "ratio=0.5")
    assert record.parameters.ratio >= 0.5 and len({fit.n_params for fit in record.fits if fit.shape == (48, 48)}) > 1


def test_tokens_with_enormous_inputs_and_no_gradient_do_not_change_the_estimate():
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(400, 8, generator=generator), torch.randn(400, 12, generator=generator)
    ordinary = Statistics(gram=x.T @ x, fisher=(g.square().sum(1)[:, None] * x.square()).sum(0))
    massive = torch.zeros(8, 8)
    massive[2, 2] = 1e6
    spoiled = Statistics(gram=ordinary.gram + massive, fisher=ordinary.fisher)
    weight = torch.randn(12, 8, generator=generator)
    found = [gradient_of_outputs(Norms(weight, statistics)) for statistics in (ordinary, spoiled)]
    assert found[0] == pytest.approx(float(g.square().sum(1).mean()), rel=0.1)
    assert found[1] == pytest.approx(found[0], rel=0.1)


def test_a_layer_whose_inputs_are_always_zero_has_no_gradient_to_weigh():
    assert gradient_of_outputs(Norms(torch.ones(3, 2), Statistics(gram=torch.zeros(2, 2), fisher=torch.zeros(2)))) == 0


def test_every_matrix_keeps_the_least_and_a_stronger_emphasis_gives_more_to_the_sensitive_one():
    weights = [of_values(12, 8, [3.0, 2.0, 1.5, 1.2], seed=i) for i in range(3)]
    target, seen = of_ranks(9), view(weights, (1.0, 10.0, 1.2))
    kept = shares(target, seen, least=0.7)
    assert min(kept.values()) == 2 * 32 * COST  # 0.7 of 3 ranks
    sensitive = [shares(target, seen, emphasis=e)["k"] for e in (0.1, 1.0)]
    assert sensitive[0] < sensitive[1]


@pytest.mark.parametrize(("emphasis", "least", "message"), [(0, 0.3, "budget.emphasis=0"), (1, 1.5, "budget.least=1.5")])
def test_an_invalid_setting_is_refused(emphasis, least, message):
    with pytest.raises(Exception, match=re.escape(message)):
        shares(of_ranks(6), None, emphasis, least)
