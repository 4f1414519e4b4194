"""Folders that are damaged, incomplete, foreign or not writable: one sentence, nothing lost, and nothing half loads."""

import json
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

import nla
from nla.machine.errors import NonFiniteError, UserError
from nla.machine.sealed_folder import damage, make_sealed, seal
from nla.saved.description import REMEDY
from tests import forked
from tests.conftest import TINY
from tests.test_saved import saved


def reseal(folder: Path) -> None:
    (folder / "digests.json").unlink()
    seal(folder)


def change_config(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))
    reseal(folder)


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    reseal(folder)


def first_class(value: str):
    def change(description):
        description["terms"][0]["term"]["class"] = value

    return change


DESCRIPTIONS = {
    "another version": (lambda d: d.update(format=2), r"the folder is of format 2, and this version reads format 1"),
    "an unknown term": (first_class("nla.terms.future.Term"), r"the folder's term of .* is unknown to this version"),
    "a foreign class": (first_class("os.system"), r"the folder's term of .* is unknown to this version"),
    "no term": (lambda d: d["terms"].clear(), r"config\.json lacks terms of layers"),
    "a term without layers": (lambda d: d["terms"][0].update(layers=[]), r"config\.json lacks terms of layers"),
    "a term that is a text": (lambda d: d["terms"][0].update(term="linear"), r"config\.json lacks terms of layers"),
    "no shared tensors": (lambda d: d.pop("shared"), r"names of shared tensors"),
    "a shared tensor that is no name": (lambda d: d.update(shared={"a": 1}), r"names of shared tensors"),
    "another model": (lambda d: d["terms"][0]["layers"].append("model.layers.9.mlp"), "has no linear layer"),
}


@pytest.mark.parametrize("load", [nla.load_compressed, AutoModelForCausalLM.from_pretrained], ids=["nla", "transformers"])
@pytest.mark.parametrize("case", DESCRIPTIONS)
def test_a_folder_that_this_version_cannot_make_is_refused(case, load, tmp_path):
    _, folder = saved("tiny_llama", tmp_path)
    change, sentence = DESCRIPTIONS[case]
    change_config(folder, change)
    with pytest.raises(UserError, match=sentence):
        load(folder)


def test_a_model_without_its_head_is_refused_and_the_line_names_the_right_class(tmp_path):
    _, folder = saved("tiny_llama", tmp_path)
    with pytest.raises(UserError, match="holds a LlamaForCausalLM, not a LlamaModel; load it with AutoModelForCausalLM"):
        AutoModel.from_pretrained(folder)


def test_a_folder_that_asks_for_code_of_the_hub_is_refused_before_it_is_looked_for(tmp_path):
    _, folder = saved("tiny_llama", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_implementation": "someone/kernel"}))
    reseal(folder)
    with pytest.raises(UserError, match="attn_implementation=someone/kernel would fetch code from the hub"):
        nla.load_compressed(folder)


def test_a_folder_of_another_method_is_named_as_such(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(UserError, match="does not describe a compressed model of this project"):
        nla.load_compressed(tmp_path)
    with pytest.raises(UserError, match=r"config\.json cannot be read .*give a folder that save=FOLDER"):
        nla.load_compressed(tmp_path / "nowhere")


@pytest.mark.parametrize("load", [nla.load_compressed, AutoModelForCausalLM.from_pretrained], ids=["nla", "transformers"])
def test_numbers_that_are_not_finite_and_tensors_that_are_missing_are_never_loaded(load, tmp_path):
    _, folder = saved("tiny_llama", tmp_path)
    name = "model.layers.1.mlp.up_proj.term.A"
    tensors = load_file(folder / "model.safetensors")
    change_tensors(folder, lambda t: t[name].view(-1)[5:6].fill_(float("nan")))
    with pytest.raises(NonFiniteError, match=name):
        load(folder)
    change_tensors(folder, lambda t: t.update({name: tensors[name][:-1].clone()}))
    with pytest.raises(RuntimeError):  # transformers' own error for a shape
        load(folder)
    change_tensors(folder, lambda t: t.pop(name))
    with pytest.raises(UserError, match=f"lack the tensor {name}"):
        load(folder)


def test_a_changed_byte_or_a_missing_shard_is_found_by_its_digest(tmp_path, monkeypatch):
    monkeypatch.setattr("nla.saved.save.SHARD", "20KB")
    model, folder = saved("tiny_llama", tmp_path)
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 2 and all(shard.stat().st_size < 60_000 for shard in shards)
    tokens = torch.arange(7)[None]
    assert torch.equal(nla.load_compressed(folder)(tokens).logits, model.logits(tokens))
    data = bytearray(shards[1].read_bytes())
    data[-9] ^= 1
    shards[1].write_bytes(data)
    with pytest.raises(UserError, match=f"damaged or incomplete \\({shards[1].name}\\)"):
        nla.load_compressed(folder)
    shards[1].unlink()
    with pytest.raises(UserError, match=shards[1].name):
        nla.load_compressed(folder)
    with pytest.raises(OSError, match=shards[1].name):
        AutoModelForCausalLM.from_pretrained(folder)


def test_nothing_with_nan_and_nothing_dense_is_saved_and_nothing_is_overwritten(tmp_path):
    model, folder = saved("tiny_llama", tmp_path)
    with pytest.raises(UserError, match="nothing is overwritten"):
        nla.save_compressed(model.module, folder)
    model.module.model.layers[0].mlp.up_proj.term.mu.data[0] = torch.inf
    with pytest.raises(NonFiniteError, match=r"layers\.0\.mlp\.up_proj\.term\.mu"):
        nla.save_compressed(model.module, tmp_path / "other")
    with pytest.raises(UserError, match="no compressed layer"):
        nla.save_compressed(torch.nn.Linear(2, 2), tmp_path / "other")
    assert not (tmp_path / "other").exists()


SAVE = """
import time, nla
from pathlib import Path
import nla.saved.save as save
from tests.test_saved import compressed
folder = Path({folder!r})
model = compressed('tiny_llama', folder)
{trouble}
nla.save_compressed(model.module, folder / 'saved')
"""


def test_a_full_disk_leaves_nothing_and_one_sentence(tmp_path):
    trouble = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
    result = forked.finish(["-c", SAVE.format(folder=str(tmp_path), trouble=trouble)])
    assert result.returncode != 0 and "could not be written" in result.stderr and "nothing is left of it" in result.stderr
    assert not list(tmp_path.glob("*saved*"))


def test_a_process_killed_while_it_saves_leaves_no_folder_and_the_next_one_saves(tmp_path):
    trouble = "save.card = lambda *_: time.sleep(60)"  # when all files but the card are written
    process = forked.start(["-c", SAVE.format(folder=str(tmp_path), trouble=trouble)])
    begun = time.time()
    while not list(tmp_path.glob(".making-saved-*/made/model.safetensors")):
        assert time.time() - begun < 60 and process.is_alive()
        time.sleep(0.01)
    process.kill()
    process.join()
    assert not (tmp_path / "saved").exists() and list(tmp_path.glob(".making-saved-*"))
    model, folder = saved("tiny_llama", tmp_path)
    assert not list(tmp_path.glob(".making-saved-*"))
    tokens = torch.arange(7)[None]
    assert torch.equal(nla.load_compressed(folder)(tokens).logits, model.logits(tokens))


def test_the_draft_of_a_folder_with_a_longer_name_is_left_alone(tmp_path):
    other = tmp_path / ".making-smol-refined-abcd1234"
    left = tmp_path / ".making-smol-abcd1234"
    for folder in (other, left):
        folder.mkdir()
    make_sealed(tmp_path / "smol", lambda draft, scratch: (draft / "file").touch())
    assert other.exists() and not left.exists() and (tmp_path / "smol" / "file").exists()


def test_subfolders_such_as_those_of_chat_templates_are_sealed_too(tmp_path):
    def make(draft, scratch):
        (draft / "templates").mkdir()
        (draft / "templates" / "tool.jinja").write_text("{{ tool }}")

    make_sealed(tmp_path / "model", make)
    assert not damage(tmp_path / "model")
    (tmp_path / "model" / "templates" / "tool.jinja").write_text("{{ other }}")
    assert damage(tmp_path / "model") == ["templates/tool.jinja"]


@pytest.mark.parametrize("target", ["/proc/nla/model", "taken"])
def test_a_target_that_cannot_be_written_is_one_line_before_the_work_begins(target, cli, tmp_path):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    result = cli(*TINY, "ratio=0.5", f"save={tmp_path / target}", check=False)
    said = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert result.returncode == 2 and len(said) == 1 and target in said[0], result.stderr
    assert not (tmp_path / "cache" / "fits").exists() and "Traceback" not in result.stderr


def test_a_compressed_folder_is_not_compressed_again_and_the_line_says_what_to_do(run_here, tmp_path):
    _, folder = saved("tiny_llama", tmp_path)
    with pytest.raises(UserError, match=rf"{folder} is a compressed model; .*nla\.export {folder} --to dense OUT"):
        run_here("model=llama7b", f"model.path={folder}", "track=none", "ratio=0.5")


def test_the_remedy_is_a_tensor_of_the_folder(tmp_path):
    _, folder = saved("tiny_llama", tmp_path)
    assert REMEDY in load_file(folder / "model.safetensors")
