"""Settings and data that no run can have are refused in a sentence and at once."""

import gzip
import re
import time

import pytest
from hydra.utils import instantiate

from nla.machine.cache import Cache
from tests.attack.attacks import TEXT, attack
from tests.conftest import TINY, composed, make_kernel

TUNED = ["method=nla", "retrain.steps=2"]
REFUSED = {
    "a width beyond 64 bits": ["kernel.r=999999999999999999999"],
    "a smallest h beyond 64 bits": ["kernel.min_h=999999999999999999999"],
    "steps beyond 64 bits": ["solver.steps=999999999999999999999"],
    "samples longer than the model reads": ["statistics.length=999999999", "method=svd_llm"],
    "samples without end": ["statistics.windows=999999999999", "method=svd_llm"],
    "samples of Fisher information without end": ["statistics.fisher_windows=10000000000000", "method=fwsvd"],
    "a batch without end": ["retrain.batch=999999999999999", *TUNED],
    "an infinite constant": ["kernel.c=inf", "kernel=polynomial"],
    "a width that is no number": ["kernel.sigma=nan", "kernel=gaussian"],
    "an infinite rate": ["solver.lr=inf"],
    "an infinite tolerance": ["solver.tolerance=inf"],
    "an infinite rate of retraining": ["retrain.lr=inf", *TUNED],
    "an infinite leap": ["retrain.spike=inf", *TUNED],
    "an infinite start": ["schedule.b0=inf", "budget=adaptive", *TUNED],
    "an infinite exponent": ["method.alpha=inf", "method=asvd"],
    "an infinite speed": ["estimate.flops=inf", "dry_run=true"],
    "a ratio that is no number": ["ratio=nan"],
    "infinite bits": ["bits=inf", "ratio=null"],
    "smoothing that is no number": ["budget.beta1=nan", "budget=adaptive", *TUNED],
    "outputs in no folder": ["outputs_dir="],
    "a cache in no folder": ["cache_dir="],
    "data in no file": ["data.path=", "data=wikitext2"],
    "a model in no folder": ["model.path=", "model=causal_lm"],
    "a seed that is a word": ["model.weights_seed=abc"],
    "a seed below zero": ["model.weights_seed=-1"],
    "a setting that is taken away": ["~dry_run"],
    "a name that is not there": ["ratio=${nope}"],
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_setting_that_no_run_can_have_is_refused_in_a_sentence_that_names_it(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    first = REFUSED[name][0]
    named = first.strip("~").split("=$")[0]
    attack(tmp_path / "outputs", re.escape(named), *TEXT, "model=tiny_llama", *REFUSED[name])
    assert not any(path.name != "outputs" for path in tmp_path.iterdir())


TYPED = {
    "nothing before the sign": ["=0.5"],
    "no option": ["task=null"],
    "no method": ["method=null"],
    "the name of a data set for its settings": ["retrain.steps=1", "retrain.data=sotu"],
    "a bracket": ["select.include=["],
    "a setting without value": ["ratio"],
    "an empty folder": ["cache_dir=nowhere", "outputs_dir="],
    "a sweep with a wrong option": ["-m", "method=svd,null"],
}


@pytest.mark.parametrize("name", TYPED)
def test_the_command_line_answers_in_words(name, cli, tmp_path):
    arguments = TYPED[name]
    result = cli(*TINY, *arguments, check=False)
    said = result.stdout + result.stderr
    assert result.returncode and "Traceback" not in said, said
    assert "error: " in said and re.search(re.escape(arguments[-1].split("=")[0]), said), said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("kernel", ["piecewise", "phase"])
def test_a_width_that_no_matrix_has_is_lowered_at_once_to_the_best_that_fits(kernel):
    wide = make_kernel(f"kernel={kernel}", "kernel.r=10000000000")
    begun = time.process_time()
    h, r = wide.size(4096, 11008, 13_000_000)
    assert time.process_time() - begun < 0.1
    every = {n: 13_000_000 // ((4096 + 11008) * n + 1) for n in range(1, 2000)}
    assert (h, r) == max(
        ((every[n], n) for n in every if every[n] >= wide.min_h), key=lambda size: (size[0] * size[1], size[1])
    )
    assert wide.size(4096, 11008, 5) == (0, 1)


PACKED = gzip.compress(b'{"text": "a line of text"}\n' * 500)
FILES = {
    "a number": ("a.jsonl", b'{"text": 5}\n'),
    "nothing": ("a.jsonl", b'{"text": "one"}\n{"text": null}\n'),
    "a list": ("a.jsonl", b'{"text": ["one"]}\n'),
    "brackets": ("a.jsonl", b'{"text": ' + b"[" * 200_000 + b"\n"),
    "no field": ("a.jsonl", b'{"words": "one"}\n'),
    "cut in the middle": ("a.jsonl.gz", PACKED[: len(PACKED) // 2]),
    "damaged": ("a.jsonl.gz", PACKED[:20] + b"\xff\xff\xff" + PACKED[23:]),
    "not packed": ("a.jsonl.gz", b"abc"),
    "not text": ("a.txt", bytes(range(256))),
    "no table": ("a.parquet", b"PAR1"),
}


@pytest.mark.parametrize("name", FILES)
def test_data_that_is_not_text_is_refused_before_the_run(name, tmp_path):
    file, data = FILES[name]
    (tmp_path / file).write_bytes(data)
    said = attack(tmp_path / "outputs", re.escape(file), *TEXT, "model=tiny_llama", "data=c4", f"data.path={tmp_path / file}")
    assert "cannot be read as text" in said


def test_a_small_model_that_is_trained_leaves_no_checkpoint(tmp_path):
    short = ["model.recipe.steps=3", "model.recipe.checkpoint=1", "model.recipe.warmup=1", "model.batch=32"]
    overrides = ["model=swin_micro", *(f"++{setting}" for setting in short), "model.architecture.embed_dim=16"]
    cache = Cache(tmp_path)
    folder = instantiate(composed(*overrides).model, _convert_="all").folder(cache)
    assert (folder / "model.safetensors").is_file() and not list((tmp_path / "trainings").iterdir())
