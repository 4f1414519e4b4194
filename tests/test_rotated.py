"""A rotated model computes the same function with other weights: model=smollm2_rotated."""

from copy import deepcopy

import pytest
import torch
from hydra.utils import instantiate

from nla.harness.settings import check_settings
from nla.machine.cache import Cache
from nla.machine.errors import UserError
from nla.machine.sealed_folder import intact
from nla.models.causal_lm import from_architecture
from nla.models.rotation import ROTATABLE, random_basis, rotate
from tests.conftest import configuration, make_model, save_as_folder

GROUP = 32  # weights that share a minimum and a step in Q4_1
SIZES = {
    "vocab_size": 80,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
TOKENS = torch.arange(2 * 30).reshape(2, 30)


def source(of: str, *overrides: str):
    return instantiate(configuration("model=smollm2_rotated", f"model@model.of={of}", *overrides).model, _convert_="all")


def random_model(kind: str = "llama", **settings):
    """A small model whose weights, gains and biases are all random."""
    model = from_architecture({"model_type": kind, **SIZES} | settings).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(1 + torch.randn_like(p) / 2 if "norm" in name else torch.randn_like(p) / 8)
    return model


def rotated(model, seed: int = 1):
    other = deepcopy(model)
    rotate(other, random_basis(model.config.hidden_size, seed))
    return other


@torch.no_grad()
def assert_same_function(model, other):
    expected, found = model(TOKENS).logits, other(TOKENS).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))


def matrices(model) -> dict[str, torch.Tensor]:
    """The matrices of the blocks, by name."""
    return {name: p.detach() for name, p in model.named_parameters() if "layers." in name and p.ndim == 2}


def on_grid(weight: torch.Tensor) -> torch.Tensor:
    """The weight (out, in) on the grid of Q4_1: 16 equidistant values from the smallest to the largest of each group."""
    groups = weight.unflatten(1, (-1, GROUP))
    low = groups.amin(2, keepdim=True)
    step = (groups.amax(2, keepdim=True) - low) / 15
    return (((groups - low) / step).round() * step + low).flatten(1)


def most_values(weight: torch.Tensor) -> list[int]:
    """The number of different values in each group of a weight (out, in), to 5 digits."""
    return [len(set(group)) for group in (weight * 1e5).round().int().unflatten(1, (-1, GROUP)).flatten(0, 1).tolist()]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("kind", ROTATABLE)
def test_the_rotated_model_has_the_same_logits_although_all_its_matrices_differ(kind, tied):
    model = random_model(kind, tie_word_embeddings=tied)
    other = rotated(model)
    assert_same_function(model, other)
    assert all(not torch.allclose(w, matrices(other)[name], atol=1e-2) for name, w in matrices(model).items())
    assert all(bool((p == 1).all()) for name, p in other.named_parameters() if "norm" in name)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_biases_and_any_number_of_key_heads_are_rotated_too(heads):
    model = random_model(num_key_value_heads=heads, attention_bias=True, mlp_bias=True)
    assert_same_function(model, rotated(model))


def test_the_basis_is_orthogonal_and_the_same_for_the_same_seed():
    basis = random_basis(64, 3)
    torch.testing.assert_close(basis.T @ basis, torch.eye(64, dtype=torch.float64), rtol=0, atol=1e-13)
    assert torch.equal(basis, random_basis(64, 3)) and not torch.allclose(basis, random_basis(64, 4), atol=0.1)


def test_weights_that_were_on_a_grid_of_4_bits_are_on_none_after_the_rotation():
    model = random_model()
    with torch.no_grad():
        for weight in matrices(model).values():
            weight.copy_(on_grid(weight))
    other = matrices(rotated(model))
    for name, weight in matrices(model).items():
        assert max(most_values(weight)) <= 16 and min(most_values(other[name])) > 16
        errors = [float((on_grid(w) - w).norm() / w.norm()) for w in (weight, other[name])]
        assert errors[0] < 1e-5 and errors[1] > 0.05


def test_a_rotated_source_is_its_model_with_a_head_of_its_own_and_is_kept_in_the_cache(tmp_path):
    cache, of = Cache(tmp_path), source("tiny_llama")
    plain, first = make_model("tiny_llama", tmp_path), of.load("cpu", "float32", cache)
    assert_same_function(plain.module, first.module)
    assert first.encode("a text").equal(plain.encode("a text"))
    assert first.module.lm_head.weight is not first.module.model.embed_tokens.weight
    assert sum(p.numel() for p in first.module.parameters()) == of.inventory(cache).parameters
    assert of.inventory(cache).parameters == sum(p.numel() for p in plain.module.parameters()) + 256 * 48
    (folder,) = (tmp_path / "models").iterdir()
    assert folder == of.folder(cache) and intact(folder)
    again = source("tiny_llama").load("cpu", "float32", Cache(tmp_path / "other")).module.state_dict()
    assert all(torch.equal(p, again[name]) for name, p in first.module.state_dict().items())
    others = [source("tiny_llama", "model.rotation_seed=1"), source("tiny_llama", "model.of.weights_seed=1")]
    assert len({folder, *(other.folder(cache) for other in others)}) == 3


def test_a_model_of_another_architecture_is_refused_with_one_sentence(tmp_path):
    said = r"^a model of model_type=opt cannot be rotated, because .*; allowed: llama, .* model@model\.of=tiny_llama$"
    with pytest.raises(UserError, match=said):
        source("tiny_opt").inventory(Cache(tmp_path))


def test_a_folder_is_rotated_and_other_weights_in_it_are_another_model(tmp_path):
    folder, cache = save_as_folder("tiny_llama", tmp_path / "model"), Cache(tmp_path / "cache")
    of = source("causal_lm", f"model.of.path={folder}")
    of.inspect(cache)
    assert_same_function(make_model("tiny_llama", tmp_path).module, of.load("cpu", "float32", cache).module)
    before = of.identity(cache), of.folder(cache)
    other = random_model(**source("tiny_llama").of.architecture)
    other.save_pretrained(folder)
    assert of.identity(cache) != before[0] and of.folder(cache) != before[1]
    assert_same_function(other, of.load("cpu", "float32", cache).module)


def test_a_rotated_model_has_the_licence_of_its_model():
    of = ([], ["model@model.of=tiny_llama"])
    found = [check_settings(configuration("model=smollm2_rotated", *asked))["model"]["licence"] for asked in of]
    assert found == ["Apache-2.0", "unknown"]


def test_a_wrong_seed_and_a_source_that_is_none_are_refused():
    for setting, message in {
        "model.rotation_seed=-1": r"model\.rotation_seed=-1 must be a whole number from 0",
        "model.of=tiny_llama": r"model\.of=tiny_llama is not the settings of a model; .*model@model\.of=tiny_llama",
        "model.of.weights_seed=-1": r"model\.weights_seed=-1 must be",
    }.items():
        with pytest.raises(Exception) as caught:
            source("tiny_llama", setting)
        assert isinstance(caught.value.__cause__, UserError) and caught.match(message)


def test_plain_svd_of_a_rotated_model_has_the_errors_and_the_perplexity_of_its_model(run_here):
    asked = ["task.window=64", "task.max_windows=3", "track=none", "method=svd", "ratio=0.5"]
    plain = run_here("model=tiny_llama", *asked)
    other = run_here("model=smollm2_rotated", "model@model.of=tiny_llama", *asked)
    for stage in ("dense", "compressed"):  # the gains of tiny_llama are 1, and SVD turns as the matrices do
        found, expected = (run.metrics[stage]["language_modelling"]["sotu"]["nll"] for run in (other, plain))
        assert found == pytest.approx(expected, rel=1e-4)
    assert [fit.relative_error for fit in other.fits] == pytest.approx([fit.relative_error for fit in plain.fits], rel=1e-3)
