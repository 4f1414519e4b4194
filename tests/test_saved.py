"""Compressed models as folders: what was saved is loaded, by the commands and calls that a user would type."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import nla
from nla.compressed.contents import count_bits
from nla.compressed.layer import CompressedLinear
from nla.compressed.surgery import swap
from nla.machine.cache import Cache
from nla.machine.errors import UserError
from nla.models.base import LanguageModel
from nla.models.select import linear_specs
from nla.stages.continue_prompt import TOKENS, continuation
from nla.terms.base import Sum
from nla.terms.kernel_term import KernelTerm
from tests import forked
from tests.conftest import ROOT, TINY, make_kernel, make_model, only_folder, only_record, settings

KERNELS = ["linear", "piecewise", "phase", "gaussian"]
TEXTS, PROMPT = ["tiny_llama", "tiny_opt"], torch.tensor([list(b"We hold these truths")])


def compressed(name: str, folder: Path, kernels: list[str] = KERNELS):
    """A tiny model whose linear layers have these kernels in turn, and the last one a sum of two."""
    folder.mkdir(parents=True, exist_ok=True)
    model, generator = make_model(name, folder), torch.Generator().manual_seed(0)
    specs = [spec for spec in linear_specs(model.module) if not spec.tied]

    def term(spec, i):
        kernel = make_kernel(f"kernel={kernels[i % len(kernels)]}")
        return KernelTerm(kernel, kernel.random_start(spec.out_features, spec.in_features, 2, 2, generator).scaled(0.2))

    terms = {spec.name: term(spec, i) for i, spec in enumerate(specs)}
    swap(model.module, terms | {specs[-1].name: Sum([term(specs[-1], 0), term(specs[-1], 1)])})
    return model


def saved(name: str, folder: Path, kernels: list[str] = KERNELS):
    """A compressed tiny model, and the folder in which it is saved."""
    model = compressed(name, folder, kernels)
    nla.save_compressed(model.module, folder / "saved", getattr(model, "tokenizer", None))
    return model, folder / "saved"


def python(code: str, fresh: bool = False) -> str:
    """What the code prints in a process of its own."""
    result = subprocess.run([sys.executable, "-c", code], **settings()) if fresh else forked.finish(["-c", code])
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def generated(model) -> torch.Tensor:
    return model.generate(PROMPT, attention_mask=torch.ones_like(PROMPT), max_new_tokens=50, min_new_tokens=50, do_sample=False)


@pytest.mark.parametrize(
    ("asked", "own", "other"),
    [
        ("method=hybrid", "float32", "bfloat16"),
        ("method=svd_llm", "bfloat16", "float32"),
        ("bits=4.3 method=rtn", "float32", "bfloat16"),
        ("bits=4.3 method=quip", "bfloat16", "float32"),
        ("bits=3 method=nla_angles", "float32", "bfloat16"),
    ],
)
def test_a_folder_loads_in_another_type_than_its_own(asked, own, other, run_here, tmp_path):
    few = ["statistics.windows=4", "statistics.length=32", "solver.steps=2", r"select.include='layers\.1'"]
    ratio = [] if "bits" in asked else ["ratio=0.5"]
    run_here(*TINY, *asked.split(), *ratio, *few, f"dtype={own}", f"save={tmp_path / 'kept'}")
    dtype = getattr(torch, other)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "kept", dtype=dtype)
    assert {p.dtype for p in model.parameters()} == {dtype}
    expected = nla.load_compressed(tmp_path / "kept").to(dtype)
    with torch.no_grad():
        torch.testing.assert_close(model(PROMPT).logits, expected(PROMPT).logits, rtol=0.05, atol=0.01)


LOADED = """
import sys, nla
assert 'torch' not in sys.modules or 'tests.preloaded' in sys.modules
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from tests.test_saved import PROMPT, generated
model = AutoModelForCausalLM.from_pretrained({folder!r})
with torch.no_grad():
    save_file(dict(logits=model(PROMPT).logits, tokens=generated(model)), {out!r})
"""


@pytest.mark.parametrize("name", TEXTS)
def test_another_process_loads_the_same_logits_and_the_same_fifty_tokens(name, tmp_path):
    model, folder = saved(name, tmp_path)
    python(LOADED.format(folder=str(folder), out=str(tmp_path / "out")))
    found = load_file(tmp_path / "out")
    with torch.no_grad():
        assert torch.equal(found["logits"], model.module(PROMPT).logits)
    assert torch.equal(found["tokens"], generated(model.module)) and found["tokens"].shape == (1, 70)


def test_a_swin_of_another_process_has_the_same_logits_and_image_transform(tmp_path):
    model, folder = saved("tiny_swin", tmp_path)
    images = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    save_file({"images": images}, tmp_path / "images")
    code = (
        "import nla, torch; from safetensors.torch import load_file, save_file; from timm.data import resolve_model_data_config"
    )
    code += f"\nmodel = nla.load_compressed({str(folder)!r}); print(resolve_model_data_config(model))"
    code += f"\nwith torch.no_grad(): out = model(load_file({str(tmp_path / 'images')!r})['images'])"
    code += f"\nsave_file(dict(out=out), {str(tmp_path / 'out')!r})"
    assert "'input_size': (1, 16, 16)" in python(code)
    with torch.no_grad():
        assert torch.equal(load_file(tmp_path / "out")["out"], model.module(images))


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_swin"])
def test_a_factor_that_layers_share_is_stored_once_and_is_shared_again(name, tmp_path):
    model = make_model(name, tmp_path)
    first, *others = linear_specs(model.module)
    second = next(spec for spec in others if spec.in_features == first.in_features)
    generator, terms = torch.Generator().manual_seed(0), {}
    for spec in (first, second):
        kernel = make_kernel("kernel=linear")
        terms[spec.name] = KernelTerm(kernel, kernel.random_start(spec.out_features, spec.in_features, 3, 1, generator))
    terms[second.name].B = terms[first.name].B
    swap(model.module, terms)
    nla.save_compressed(model.module, tmp_path / "saved")
    assert f"{second.name}.term.B" not in load_file(tmp_path / "saved" / "model.safetensors")
    again = nla.load_compressed(tmp_path / "saved")
    assert again.get_submodule(second.name).term.B is again.get_submodule(first.name).term.B
    assert count_bits(again) == count_bits(model.module)
    for spec in (first, second):
        assert torch.equal(again.get_submodule(spec.name).term.dense(), terms[spec.name].dense())


RUNS = {
    "tiny_llama": [*TINY, "kernel=piecewise", "retrain.steps=2", "retrain.length=64", "retrain.watch=0"],
    "tiny_opt": [*TINY, "model=tiny_opt", "kernel=gaussian", "solver.steps=5"],
    "tiny_swin": ["model=tiny_swin", "track=none", "method=hybrid", "solver.steps=5", "task.max_images=64"],
}


@pytest.mark.parametrize("name", RUNS)
def test_the_folder_that_a_command_saves_has_the_figures_of_its_record(name, cli, tmp_path):
    arguments = [*RUNS[name], "ratio=0.5"]
    result = cli(*arguments, f"save={tmp_path / 'new' / 'model'}")
    record, folder = only_record(tmp_path), tmp_path / "new" / "model"
    assert record["saved"] == str(folder) and f"saved:  {folder}" in result.stdout
    stage = list(record["metrics"])[-1]
    assert stage == ("retrained" if name == "tiny_llama" else "compressed")
    ((task, found),) = record["metrics"][stage].items()
    module = nla.load_compressed(folder)
    assert sum(isinstance(m, CompressedLinear) for m in module.modules()) == len(record["fits"])
    if name in TEXTS:
        model = LanguageModel(module, make_model(name, tmp_path).tokenizer)
        assert continuation(model, record["config"]["prompt"], TOKENS) == record["continuations"][stage]
    else:
        from nla.models.vision import classifier

        model = classifier(module, "cpu", "float32")
    again = evaluated(arguments, model, tmp_path / "elsewhere")
    different = [k for k, v in again.items() if v != next(iter(found.values()))[k]]
    assert not set(different) - {"seconds", "tokens_per_second", "images_per_second", "peak_bytes"}, different
    card = (folder / "README.md").read_text()
    assert record["command"] in card and f"| {stage} | {task} |" in card and "import nla" in card


def evaluated(arguments: list[str], model, folder: Path) -> dict[str, float]:
    """The figures of a model by the task of these arguments."""
    from hydra.utils import instantiate

    from tests.conftest import configuration

    (node,) = [node for node in configuration(*arguments).task.values() if hasattr(node, "keys")]
    (figures,) = instantiate(node, _convert_="all").evaluate(model, Cache(folder), "state", "test").values()
    return figures


def test_a_finished_run_saves_its_model_when_asked_later_and_only_once(run_here, tmp_path):
    fast = [*TINY, "ratio=0.5", "method=svd"]
    assert run_here(*fast).saved is None
    record, folder = run_here(*fast, "save=true"), only_folder(tmp_path)
    assert record.saved == str(folder / "model") and nla.load_compressed(folder / "model")
    written = (folder / "model" / "config.json").stat().st_mtime_ns
    assert run_here(*fast, "save=true").saved == record.saved
    assert (folder / "model" / "config.json").stat().st_mtime_ns == written
    (folder / "model" / "config.json").write_text("mine now")
    with pytest.raises(UserError, match="nothing is overwritten"):
        run_here(*fast, "save=true")


FRESH = """
import sys, torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

tokens, out = torch.arange(9)[None], {}
for name in NAMES:
    AutoModelForCausalLM.from_pretrained(name + '/dense')
    try:
        AutoModelForCausalLM.from_pretrained(name + '/saved')
    except RuntimeError:
        print('refused', name)
    FOLDER = name + '/pairs'
    exec(open(FOLDER + '/README.md').read().partition('```python')[2].partition('```')[0])
    out[name + '/pairs'] = model(tokens).logits.detach()
    out[name + '/dense'] = AutoModelForCausalLM.from_pretrained(name + '/dense')(tokens).logits.detach()
assert 'nla' not in sys.modules
import nla
for name in NAMES:
    out[name + '/saved'] = AutoModelForCausalLM.from_pretrained(name + '/saved')(tokens).logits.detach()
save_file(out, 'out')
"""


def test_without_this_project_the_folder_is_refused_and_its_dense_form_and_its_pairs_are_loaded(tmp_path):
    for name in TEXTS:
        _, folder = saved(name, tmp_path / name, KERNELS[:3])
        for to in ("dense", "pairs"):
            export(folder, "--to", to, str(tmp_path / name / to), *(["--multiple", "32"] if to == "pairs" else []))
    run = settings({"PYTHONPATH": str(ROOT)}) | {"cwd": tmp_path}
    result = subprocess.run([sys.executable, "-c", FRESH.replace("NAMES", repr(TEXTS))], **run)
    assert result.returncode == 0 and result.stdout.split() == ["refused", TEXTS[0], "refused", TEXTS[1]], result.stderr
    assert result.stderr.count("this model is compressed: run `import nla` before from_pretrained") == 2
    logits = load_file(tmp_path / "out")
    for name in TEXTS:
        for form in ("dense", "pairs"):
            torch.testing.assert_close(logits[f"{name}/{form}"], logits[f"{name}/saved"], rtol=1e-4, atol=1e-5)
        ranks = json.loads((tmp_path / name / "pairs" / "pairs.json").read_text())
        assert set(ranks.values()) == {32} and (tmp_path / name / "dense" / "tokenizer.json").exists()


def export(*arguments: str | Path, code: int = 0) -> subprocess.CompletedProcess:
    """`python -m nla.export arguments`, which must end with this exit code."""
    result = forked.finish(["-m", "nla.export", *map(str, arguments)])
    assert result.returncode == code, result.stdout + result.stderr
    return result


def test_the_dense_form_and_the_pairs_of_a_swin_are_ordinary_timm_models(tmp_path):
    import timm

    model, folder = saved("tiny_swin", tmp_path, KERNELS[:3])
    images = torch.randn(3, 1, 16, 16, generator=torch.Generator().manual_seed(0))
    for to in ("dense", "pairs"):
        export(folder, "--to", to, tmp_path / to)
    dense = timm.create_model(f"local-dir:{tmp_path / 'dense'}", pretrained=True).eval()
    names = {"FOLDER": str(tmp_path / "pairs")}
    cards = {to: (tmp_path / to / "README.md").read_text() for to in ("dense", "pairs")}
    assert not any("library_name" in card for card in cards.values()) and "library_name" in (folder / "README.md").read_text()
    exec(cards["pairs"].partition("```python")[2].partition("```")[0], names)
    with torch.no_grad():
        for other in (dense, names["model"]):
            torch.testing.assert_close(other(images), model.module(images), rtol=1e-4, atol=1e-5)


def test_a_kernel_without_thin_factors_is_no_pair_and_that_is_one_line(tmp_path):
    _, folder = saved("tiny_llama", tmp_path)
    result = export(folder, "--to", "pairs", tmp_path / "out", code=1)
    assert not (tmp_path / "out").exists()
    assert re.search(r"^error: .*gaussian h=2 r=2\) has no thin factors.*use --to dense$", result.stderr, re.MULTILINE)


def test_import_nla_is_light_and_run_py_too():
    code = "import nla, sys; print(sorted({'torch', 'transformers', 'numpy', 'hydra'} & set(sys.modules)))"
    assert python(code, fresh=True).strip() == "[]"


def test_a_plain_loop_trains_a_loaded_model_whose_own_save_pretrained_keeps_it(tmp_path):
    _, folder = saved("tiny_llama", tmp_path)
    model = AutoModelForCausalLM.from_pretrained(folder)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    losses = []
    for _ in range(5):
        loss = model(PROMPT, labels=PROMPT).loss
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.save_pretrained(tmp_path / "tuned")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert torch.equal(again(PROMPT).logits, model(PROMPT).logits)
    nla.save_compressed(again, tmp_path / "sealed")
    assert torch.equal(nla.load_compressed(tmp_path / "sealed")(PROMPT).logits, model(PROMPT).logits)


def test_pivot_rows_have_fewer_bits_and_the_same_matrices(tmp_path):
    model, folder = saved("tiny_llama", tmp_path, ["linear", "piecewise", "gaussian"])
    for name in (".cache", "templates"):  # of a download, which is left behind, and of a tokeniser
        (folder / name).mkdir()
        (folder / name / "file").write_text(name)
    said = export(folder, "--to", "pivoted", tmp_path / "pivoted").stdout
    assert (tmp_path / "pivoted" / "templates" / "file").exists() and not (tmp_path / "pivoted" / ".cache").exists()
    again = nla.load_compressed(tmp_path / "pivoted")
    torch.testing.assert_close(again(PROMPT).logits, model.logits(PROMPT), rtol=1e-3, atol=1e-5)
    assert count_bits(again) < count_bits(model.module)
    assert len(re.findall(r"kept, because gaussian h=\d+ r=2 has no thin factors", said)) == 4
    assert said.count("relative error") == said.count("would take") == 5
    assert "pivoted rank=4" in str(again.model.layers[0].self_attn.q_proj.term)
    refused = export(tmp_path / "pivoted", "--to", "pivoted", tmp_path / "smaller", code=1)
    assert "would make no layer of" in refused.stderr and not (tmp_path / "smaller").exists()
