"""Folders of language models that are broken, incomplete or of another architecture are refused before a run begins."""

import pickle
import re
from pathlib import Path

import pytest
import torch

from nla.harness.settings import check_settings
from nla.pipeline import run
from tests.attack.attacks import TEXT, attack, refusal
from tests.attack.damage import (
    as_bin,
    both,
    config,
    cut,
    damaged,
    holds,
    in_place_of,
    link_loop,
    pipe,
    shards,
    tensors,
    without,
)
from tests.conftest import configuration, only_record


class Code:
    """An object that runs code when it is unpickled: the process would end with another message than the one asked for."""

    def __reduce__(self) -> tuple:
        return exec, ("raise SystemExit('code of a model folder ran')",)


FIRST, NORM = "model.layers.0.self_attn.q_proj.weight", "model.norm.weight"
EMBEDDING = "model.embed_tokens.weight"
DAMAGED = {
    # weights that are not the architecture's: transformers fills what is missing with random numbers
    "three layers of which two are there": (config(num_hidden_layers=3), r"lack 9 .*model\.layers\.2\."),
    "two layers of which one is read": (config(num_hidden_layers=1), r"9 .*model\.layers\.1\."),
    "OPT over LLaMA": (config(model_type="opt", architectures=["OPTForCausalLM"]), "lack .*model.decoder"),
    "GPT-2 over LLaMA": (config(model_type="gpt2"), "none of the 1 linear layers"),
    "a norm is missing": (tensors(lambda t: t.pop(NORM)), r"lack 1 .*model\.norm\.weight"),
    "a tensor too many": (tensors(lambda t: t.update({"model.extra": torch.ones(3)})), r"1 .*model\.extra"),
    "an untied head that is missing": (config(tie_word_embeddings=False), r"lack 1 .*lm_head\.weight"),
    "a tied head of its own": (tensors(lambda t: t.update({"lm_head.weight": torch.ones(256, 48)})), r"lm_head\.weight"),
    "wrong shape": (tensors(lambda t: t.update({FIRST: torch.ones(48, 47)})), r"q_proj\.weight.*48x47.*48x48"),
    "another width": (config(intermediate_size=81), r"80.*81"),
    "another vocabulary": (config(vocab_size=300), r"embed_tokens.*256x48.*300x48"),
    "quantised numbers": (tensors(lambda t: t.update({FIRST: t[FIRST].to(torch.int8)})), r"q_proj\.weight.*int8"),
    "float8 numbers": (tensors(lambda t: t.update({FIRST: t[FIRST].to(torch.float8_e4m3fn)})), r"q_proj\.weight.*float8"),
    # files of weights
    "truncated weights": (cut("model.safetensors", 0.6), r"model\.safetensors"),
    "weights cut in the header": (cut("model.safetensors", 0.001), r"model\.safetensors"),
    "empty weights": (holds("model.safetensors", b""), r"model\.safetensors"),
    "weights of no tensors": (tensors(lambda t: t.clear()), r"lack"),
    "a header that is no JSON": (holds("model.safetensors", (40).to_bytes(8, "little") + b"x" * 99), r"model\.safetensors"),
    "a header of exabytes": (holds("model.safetensors", b"\xff" * 99), r"model\.safetensors"),
    "weights that are a text": (holds("model.safetensors", b"version https://git-lfs.github.com/spec/v1\n" * 9), "model.saf"),
    "weights that are a pipe": (in_place_of("model.safetensors", pipe), "model.safetensors"),
    "weights that are a folder": (in_place_of("model.safetensors", Path.mkdir), "model.safetensors"),
    "weights that are a broken link": (in_place_of("model.safetensors", lambda p: p.symlink_to("gone")), "model.safetensors"),
    "no weights": (without("model.safetensors"), "weights"),
    "weights under another name": (lambda f: (f / "model.safetensors").rename(f / "weights.safetensors"), "safetensors"),
    "a missing shard": (both(shards, without("model-00002-of-00002.safetensors")), "model-00002-of-00002.safetensors"),
    "a truncated shard": (both(shards, cut("model-00002-of-00002.safetensors", 0.5)), "model-00002-of-00002.safetensors"),
    "an index that is no JSON": (both(shards, holds("model.safetensors.index.json", b"{")), "index.json"),
    "an empty index": (both(shards, holds("model.safetensors.index.json", {})), "index.json"),
    "an index that is a list": (both(shards, holds("model.safetensors.index.json", [1])), "index.json"),
    "an index of numbers": (both(shards, holds("model.safetensors.index.json", {"weight_map": {"a": 1}})), "index.json"),
    "an index that leads outside": (
        both(shards, holds("model.safetensors.index.json", {"weight_map": {"a": "../../x.safetensors"}})),
        "index.json",
    ),
    "a truncated .bin": (both(as_bin, cut("pytorch_model.bin", 0.6)), "pytorch_model.bin"),
    "a .bin that is code": (
        both(without("model.safetensors"), holds("pytorch_model.bin", pickle.dumps(Code()))),
        "pytorch_model.bin",
    ),
    "a .bin of other things": (
        both(as_bin, lambda f: torch.save({"step": 3}, f / "pytorch_model.bin")),
        "pytorch_model.bin",
    ),
    "an adapter": (
        holds("adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": "x/y", "r": 4}),
        r"adapter_config\.json",
    ),
    "an adapter alone": (
        both(without("model.safetensors", "config.json"), holds("adapter_config.json", {"peft_type": "LORA"})),
        r"adapter_config\.json",
    ),
    # config.json
    "an empty config": (holds("config.json", b""), r"config\.json"),
    "a config without values": (holds("config.json", {}), "model_type=None"),
    "a binary config": (holds("config.json", bytes(range(256))), r"config\.json"),
    "a config that is a list": (holds("config.json", [1, 2]), r"config\.json"),
    "a config of brackets": (holds("config.json", b"[" * 200_000), r"config\.json"),
    "a config that is a folder": (in_place_of("config.json", Path.mkdir), r"config\.json"),
    "a config that is a pipe": (in_place_of("config.json", pipe), r"config\.json"),
    "a config that is a link loop": (in_place_of("config.json", link_loop), r"config\.json"),
    "a config that is a device": (in_place_of("config.json", lambda p: p.symlink_to("/dev/zero")), r"config\.json"),
    "a model type of no model": (config(model_type="lama"), "lama"),
    "a model type that is a number": (config(model_type=5), "model_type=5"),
    "a model type of images": (config(model_type="vit"), "model_type=vit"),
    "a quantised model": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quantization_config"),
    "an unknown quantisation": (config(quantization_config={"quant_method": "mine"}), "quantization_config"),
    "code from the hub": (config(attn_implementation="kernels-community/flash-attn"), "kernels-community"),
    "code from the hub, private": (config(_attn_implementation="kernels-community/flash-attn"), "kernels-community"),
    "unknown attention": (config(attn_implementation="fast"), "fast"),
    "other files": (config(transformers_weights="other.safetensors"), "transformers_weights"),
    "a million layers": (config(num_hidden_layers=1_000_000), "num_hidden_layers=1000000"),
    "10^30 layers": (config(num_hidden_layers=10**30), "num_hidden_layers=1000"),
    "layers that are text": (config(num_hidden_layers="two"), "num_hidden_layers|two"),
    "minus one layer": (config(num_hidden_layers=-1), "none of the 1 linear layers"),
    "no width": (config(hidden_size=0), "."),
    "no heads": (config(num_attention_heads=0), "."),
    "a width of 10^15": (config(hidden_size=10**15), "."),
    "a vocabulary of 10^15": (config(vocab_size=10**15), "."),
    "no activation": (config(hidden_act="nope"), "nope"),
    "an epsilon that is no number": (config(rms_norm_eps=float("nan")), "rms_norm_eps=nan"),
    "a type that is none": (config(dtype="float7"), "float7"),
    # other files
    "a broken generation_config": (holds("generation_config.json", b"{"), r"generation_config\.json"),
    "a generation_config that is a pipe": (in_place_of("generation_config.json", pipe), r"generation_config\.json"),
    "no tokeniser": (without("tokenizer.json", "tokenizer_config.json"), "tokeniser"),
    "a truncated tokeniser": (cut("tokenizer.json", 0.5), "tokenizer.json|tokeniser"),
    "an empty tokeniser": (holds("tokenizer.json", b""), "tokenizer.json|tokeniser"),
    "a tokeniser of nothing": (holds("tokenizer.json", {}), "tokeniser"),
    "a tokeniser that is a pipe": (in_place_of("tokenizer.json", pipe), r"tokenizer\.json"),
    "a broken tokenizer_config": (holds("tokenizer_config.json", b"\xff\xfe"), "tokenizer_config.json|tokeniser"),
}


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_folder_is_refused_in_a_sentence_before_the_run(name, tmp_path):
    damage, expected = DAMAGED[name]
    folder = damaged(tmp_path, damage)
    attack(tmp_path / "outputs", expected, *TEXT, "model=causal_lm", f"model.path={folder}")


NOT_FINITE = {
    "a norm is not a number": (tensors(lambda t: t[NORM].fill_(float("nan"))), "float32", r"model\.norm\.weight"),
    "an embedding is infinite": (tensors(lambda t: t[EMBEDDING][5, 5].fill_(float("-inf"))), "float32", "embed_tokens"),
    "an embedding is too large for its type": (tensors(lambda t: t[EMBEDDING][5, 5].fill_(1e6)), "float16", "embed_tokens"),
}


@pytest.mark.parametrize("name", NOT_FINITE)
def test_a_number_that_is_not_finite_is_an_error_that_names_the_tensor_before_anything_is_measured(name, tmp_path):
    damage, dtype, expected = NOT_FINITE[name]
    folder = damaged(tmp_path, damage)
    arguments = [*TEXT, "model=causal_lm", f"model.path={folder}", f"dtype={dtype}", f"outputs_dir={tmp_path}"]
    said = refusal(lambda: run(check_settings(configuration(*arguments))))
    assert re.search(f"{expected}.*NaN or infinite.*{dtype}", said), said
    record = only_record(tmp_path)
    assert (record["status"], record["error"], record["metrics"]) == ("failed", said, {})


@pytest.mark.parametrize("name", ["three layers of which two are there", "truncated weights", "a config that is a pipe"])
def test_the_command_line_says_it_in_one_line_and_fails(name, cli, tmp_path):
    folder = damaged(tmp_path, DAMAGED[name][0])
    result = cli(*TEXT, "model=causal_lm", f"model.path={folder}", check=False)
    assert result.returncode == 2 and not (tmp_path / "runs").exists()
    (line,) = (result.stdout + result.stderr).splitlines()
    assert re.match(f"error: .*{DAMAGED[name][1]}", line), line
