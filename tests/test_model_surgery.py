"""Selecting, planning, swapping and counting, on small models with biases and tied weights."""

from typing import ClassVar

import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from nla.budget.base import Target
from nla.budget.plan import Plan, make_plan
from nla.budget.sensitivity import Sensitivity
from nla.compressed.contents import count_parameters
from nla.compressed.layer import CompressedLinear
from nla.compressed.surgery import merge, swap
from nla.kernels.linear import Linear
from nla.machine.cache import Cache
from nla.machine.errors import UserError
from nla.matrix.inputs import Statistics
from nla.methods.svd import SVD
from nla.models.select import LinearSpec, linear_specs, select_linears
from tests.conftest import configuration, options

SPECS = [LinearSpec("model.layers.0.fc", 40, 30), LinearSpec("model.layers.1.fc", 30, 40), LinearSpec("lm_head", 90, 30)]
UNIFORM = instantiate(configuration().budget)


def target(ratio: float) -> Target:
    return Target((1 - ratio) * 32, 32, f"ratio={ratio}")


def plan_of(specs: list[LinearSpec], ratio: float) -> Plan:
    return make_plan(specs, target(ratio), UNIFORM.allocate(specs, target(ratio)), SVD(), torch.float32)


@pytest.fixture(params=["tiny_llama", "tiny_opt"])
def model(request, tmp_path):
    source = instantiate(configuration(f"model={request.param}").model, _convert_="all")
    return source.load("cpu", "float32", Cache(tmp_path))


def fit_all(module: nn.Module, ratio: float = 0.5) -> dict:
    plan = plan_of(select_linears(linear_specs(module), "layers", None), ratio)
    generator = torch.Generator().manual_seed(0)
    return {
        m.spec.name: SVD().compress([module.get_submodule(m.spec.name).weight], m.bits, [Statistics()], generator)[0].term
        for m in plan.matrices
    }


def test_selection_searches_names_and_tells_nothing_found_from_all_excluded():
    assert [s.name for s in select_linears(SPECS, "layers", r"\.1\.")] == ["model.layers.0.fc"]
    with pytest.raises(UserError, match=r"select\.include=blocks is found in none of the 3 .*model\.layers\.0\.fc"):
        select_linears(SPECS, "blocks", None)
    with pytest.raises(UserError, match=r"select\.exclude=fc excludes all 2"):
        select_linears(SPECS, "layers", "fc")
    with pytest.raises(UserError, match=r"lm_head shares .*select\.exclude='lm_head'"):
        select_linears([*SPECS[:2], LinearSpec("lm_head", 90, 30, tied=True)], ".", None)
    with pytest.raises(UserError, match=r"select\.include=\( is not a regular expression"):
        select_linears(SPECS, "(", None)


def test_a_plan_never_exceeds_what_the_ratio_leaves():
    for ratio in (0.1, 0.37, 0.7, 0.9):
        plan = plan_of(SPECS, ratio)
        assert sum(plan.kept.values()) <= (1 - ratio) * sum(s.n_params for s in SPECS)


def test_a_budget_below_one_triplet_names_the_matrix_and_a_ratio_that_works():
    with pytest.raises(UserError, match=r"layers\.0\.fc \(40x30\) .*ratio=0\.94 at most") as caught:
        plan_of(SPECS, 0.97)
    assert "71" in str(caught.value)
    assert all(plan_of(SPECS, 0.94).kept.values())


def test_a_swapped_model_computes_with_the_compressed_matrices_and_keeps_biases(model):
    module = model.module
    fits = fit_all(module)
    names = list(fits)
    dense = {name: module.get_submodule(name) for name in names}
    x = torch.randn(3, dense[names[0]].in_features)
    first_bias = dense[names[0]].bias
    expected = nn.functional.linear(x, Linear().dense(fits[names[0]].triplets), first_bias)
    swap(module, fits)
    torch.testing.assert_close(module.get_submodule(names[0])(x), expected)
    assert all(isinstance(module.get_submodule(name), CompressedLinear) for name in names)


def test_merging_gives_dense_layers_with_the_same_outputs(model):
    tokens = model.encode("The state of the union is")[None]
    swap(model.module, fit_all(model.module))
    compressed = model.module(tokens).logits
    merge(model.module)
    assert not any(isinstance(m, CompressedLinear) for m in model.module.modules())
    torch.testing.assert_close(model.module(tokens).logits, compressed, rtol=1e-4, atol=1e-4)


def test_the_count_falls_by_exactly_what_the_fits_save(model):
    before = count_parameters(model.module)
    fits = fit_all(model.module)
    saved = sum(model.module.get_submodule(n).weight.numel() - term.count() for n, term in fits.items())
    swap(model.module, fits)
    assert count_parameters(model.module) == before - saved


PUBLISHED = {
    "smollm2_135m": 134_515_008,
    "smollm2_rotated": 134_515_008 + 49_152 * 576,  # a head of its own
    "llama7b": 6_738_415_616,
    "llama13b": 13_015_864_320,
    "llama2_7b": 6_738_415_616,
    "llama3_8b": 8_030_261_248,
    "opt_125m": 125_239_296,
    "opt_1_3b": 1_315_758_080,
    "opt_6_7b": 6_658_473_984,
}


@pytest.mark.parametrize("name", sorted({*options("model"), *PUBLISHED}))
def test_every_models_inventory_is_known_without_weights_and_has_the_published_count(name, of_model, tmp_path, monkeypatch):
    source, cache = instantiate(configuration(*of_model(name)).model, _convert_="all"), Cache(tmp_path)
    inventory = source.inventory(cache)
    assert inventory.parameters > sum(s.n_params for s in select_linears(inventory.linears, r"\blayers\.", None))
    if name in PUBLISHED:
        assert inventory.parameters == PUBLISHED[name]
    if name.startswith("tiny"):
        assert inventory.parameters == sum(p.numel() for p in source.load("cpu", "float32", cache).module.parameters())
    monkeypatch.setattr(type(source), "empty", lambda *_: 1 / 0)  # a second time, no model is built
    assert source.inventory(cache) == inventory


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_opt"])
def test_an_untrained_model_reloads_bit_equal_without_touching_the_global_seed(name, tmp_path):
    source = instantiate(configuration(f"model={name}").model, _convert_="all")
    state = torch.random.get_rng_state()
    first, again = (source.load("cpu", "float32", Cache(tmp_path)).module.state_dict() for _ in range(2))
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert torch.equal(torch.random.get_rng_state(), state)


class View:
    """Losses rise as parameters go, ten times as fast for the second matrix."""

    slope: ClassVar = {"calm": 1.0, "touchy": 10.0, "calmer": 0.1}

    def losses(self, name: str, sizes: list[int]) -> list[float]:
        return [3 + self.slope[name] * (1 - bits / 32 / 1200) for bits in sizes]


def test_a_search_gives_more_to_the_matrices_that_hurt_and_keeps_the_budget():
    search = Sensitivity([0.25, 0.5, 0.75], samples=1)
    specs = [LinearSpec("calm", 40, 30), LinearSpec("touchy", 40, 30), LinearSpec("calmer", 40, 30)]
    shares = search.look(specs, target(0.5), View())
    assert shares["touchy"] > shares["calm"] >= shares["calmer"]
    assert sum(shares.values()) <= 32 * 0.5 * 3600 < sum(shares.values()) + 32 * (0.25 * 1200 + 1)
    with pytest.raises(UserError, match=r"ratio=0\.9 .*add one of 0\.1"):
        search.allocate(specs, target(0.9))
    with pytest.raises(UserError, match=r"ratio=0\.9 .*add one of 0\.1"):
        search.look(specs, target(0.9), View())  # what a linear term leaves of a target
    with pytest.raises(UserError, match=r"budget\.candidates="):
        Sensitivity([1.5], samples=1)
