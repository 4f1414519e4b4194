"""Tests of `python run.py` from the user's side: results, records and error messages."""

import itertools
import json
import subprocess
import sys

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import OPTConfig, OPTForCausalLM, PreTrainedTokenizerFast

from nla.harness.fits_table import COLUMNS, parse_terms
from nla.harness.record import read_record
from nla.harness.unknown_settings import unknown_settings
from nla.machine.errors import UserError
from tests import forked
from tests.conftest import (
    QUANTISED,
    ROOT,
    TINY,
    command,
    figures,
    only_folder,
    only_record,
    options,
    records,
    settings,
)

FAST = [*TINY, "solver.steps=10"]


def test_help_is_a_page_with_every_option_and_needs_no_heavy_import():
    code = [sys.executable, "-X", "importtime", "run.py", "--help"]
    result = subprocess.run(code, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0
    for group in (
        "model",
        "method",
        "kernel",
        "solver",
        "budget",
        "task",
        "data",
        "calibration",
        "track",
        "retrain",
        "schedule",
        "experiment",
    ):
        assert f" {group}: {', '.join(options(group))} " in " ".join(result.stdout.split())
    assert max(map(len, result.stdout.splitlines())) <= 80
    assert "python run.py model=llama7b ratio=0.7" in result.stdout
    imported = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert not imported & {"torch", "transformers", "wandb", "datasets", "pandas"}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """The outputs of a run in a Python of its own, and what it said."""
    outputs = tmp_path_factory.mktemp("whole")
    result = subprocess.run([sys.executable, *command(outputs, *FAST)], **settings())
    assert result.returncode == 0, result.stdout + result.stderr
    return outputs, result


def test_a_run_leaves_a_valid_record_a_row_per_fit_and_its_configuration(whole_run):
    outputs, result = whole_run
    record, folder = only_record(outputs), only_folder(outputs)
    assert folder.name == f"tiny_llama-nla-piecewise-0.7-{record['signature'][:8]}"
    assert read_record(folder).status == "done"
    assert list(json.loads((folder / "record.json").read_text())) == READ_FIRST
    assert record["command"] == " ".join(["python run.py", *FAST, f"outputs_dir={outputs}"])
    assert record["started"] <= record["finished"] and set(record["made_from"]) == {"inputs", "code", "packages"}
    assert "removing" in result.stdout and "perplexity" in result.stdout and str(folder / "record.json") in result.stdout
    assert set(record["continuations"]) == {"dense", "compressed"} and '"The most important duty' in result.stdout
    assert max(map(len, result.stdout.splitlines()[:-1])) <= 80

    table = (folder / "fits.csv").read_text().splitlines()
    assert table[0] == ",".join(COLUMNS) and len(table) == 15 and all(row.endswith(",,") for row in table[1:])
    assert all(fit["bits"] == 32 * fit["n_params"] and fit["status"] in ("optimal", "step_limit") for fit in record["fits"])
    lines = [json.loads(line) for line in (folder / "losses.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines] == [fit["name"] for fit in record["fits"]] and len(lines) == 14
    assert all(line["losses"][0][0] == 0 for line in lines)
    assert (folder / "config.yaml").exists() and (folder / "loss_by_layer.png").stat().st_size > 10_000

    p = record["parameters"]
    assert p["selected_after"] == sum(fit["n_params"] for fit in record["fits"]) <= 0.3 * p["selected_before"]
    assert p["model_before"] - p["model_after"] == p["selected_before"] - p["selected_after"]
    for stage in ("dense", "compressed"):
        metrics = record["metrics"][stage]["language_modelling"]["sotu"]
        assert metrics["windows"] == 3 and metrics["tokens"] == 3 * 63 and 200 < metrics["perplexity"] < 400
    assert set(record["seconds"]) == {"load", "dense", "statistics", "allocate", "fit", "compressed"}
    assert set(record["peak_bytes"]) == {"dense", "fit", "compressed"} and all(record["peak_bytes"].values())
    assert record["schema"] == 2 and record["bits"]["selected_per_weight"] == pytest.approx(32 * (1 - p["ratio"]))
    resident = [record["metrics"][s]["language_modelling"]["sotu"]["resident_bytes"] for s in ("dense", "compressed")]
    assert resident[0] - resident[1] == record["bits"]["model_bytes_before"] - record["bits"]["model_bytes_after"]


READ_FIRST = ["schema", "signature", "status", "error", "command", "started", "finished", "metrics", "continuations"]
READ_FIRST += [
    "parameters",
    "bits",
    "seconds",
    "peak_bytes",
    "refinement",
    "retraining",
    "saved",
    "made_from",
    "environment",
    "config",
    "seal",
]


def test_figures_do_not_depend_on_the_thread_count_or_on_what_was_cached(whole_run, tmp_path):
    two = tmp_path / "two"
    # here the second layer is fitted first, and the first layer beside other matrices
    for arguments in ([*FAST, r"select.include='layers\.1'"], FAST):
        two_threads = "import torch, runpy, sys; torch.set_num_threads(2); "
        asked = f"sys.argv = {command(two, *arguments)}; runpy.run_path('run.py', run_name='__main__')"
        result = forked.finish(["-c", two_threads + asked])
        assert result.returncode == 0, result.stdout + result.stderr
    assert {record["environment"]["threads"] for record in records(two)} == {2}
    whole = next(record for record in records(two) if len(record["fits"]) == 14)
    assert figures(whole) == figures(only_record(whole_run[0]))


def test_a_fault_of_the_program_has_a_traceback_and_the_exit_code_of_a_failure(tmp_path):
    broken = "import nla.pipeline, runpy, sys; nla.pipeline.prepare = lambda settings: 1 / 0; "
    asked = f"sys.argv = {command(tmp_path, *FAST)}; runpy.run_path('run.py', run_name='__main__')"
    result = forked.finish(["-c", broken + asked])
    assert result.returncode == 2 and "ZeroDivisionError" in result.stderr and "cannot be read" not in result.stderr


ARCHITECTURES = ["tiny_llama", "tiny_opt", "tiny_swin"]
EVERYWHERE = ["nla", "asvd", "fwsvd", "svd_llm"]  # these read nothing, magnitudes, Fisher information, Gram matrices
PAIRS = {(method, ARCHITECTURES[i % 3]) for i, method in enumerate(options("method"))}


@pytest.mark.parametrize(("method", "model"), sorted(PAIRS | set(itertools.product(EVERYWHERE, ARCHITECTURES))))
def test_every_method_runs_and_every_architecture_has_what_methods_read(run_here, tmp_path, method, model):
    few = ["statistics.windows=4", "statistics.length=32", r"select.include='layers\.1.*(qkv|[qk]_proj|fc1|up_proj)'"]
    task = ["task.max_images=32", "track=none"] if model == "tiny_swin" else replaced(FAST, f"model={model}")
    run_here(*task, f"model={model}", "solver.steps=10", f"method={method}", "ratio=0.5", "dtype=bfloat16", *few)
    record = only_record(tmp_path)
    assert record["status"] == "done" and record["bits"]["selected_per_weight"] <= 8
    assert method in QUANTISED or record["parameters"]["ratio"] >= 0.5


def test_asvds_search_spends_the_budget_unequally_and_answers_from_its_journal(run_here, tmp_path):
    arguments = [*FAST, "method=asvd", "budget=sensitivity", "budget.candidates=[0.3,0.7]", "ratio=0.5"]
    record = run_here(*arguments, "statistics.windows=4", "statistics.length=32")
    assert len({fit.n_params for fit in record.fits if fit.shape == (48, 48)}) > 1 and record.parameters.ratio >= 0.5
    (journal,) = (tmp_path / "cache" / "sensitivities").glob("*.jsonl")
    assert len(journal.read_text().splitlines()) == 14 * 2
    (only_folder(tmp_path) / "record.json").unlink()
    again = run_here(*arguments, "statistics.windows=4", "statistics.length=32")
    assert [fit.terms for fit in again.fits] == [fit.terms for fit in record.fits] and len(
        journal.read_text().splitlines()
    ) == 14 * 2


@pytest.mark.parametrize("kernel", options("kernel"))
def test_every_kernel_runs_end_to_end(run_here, tmp_path, kernel):
    run_here(*FAST, f"kernel={kernel}", r"select.include='layers\.0\.mlp'")
    record = only_record(tmp_path)
    assert record["status"] == "done" and all(parse_terms(f["terms"])[0].kernel.startswith(kernel) for f in record["fits"])


def replaced(arguments: list[str], *by: str) -> list[str]:
    """The arguments, in which `by` replaces those of the same settings."""
    settings = {b.partition("=")[0] for b in by}
    return [a for a in arguments if a.partition("=")[0] not in settings] + list(by)


ERRORS = [
    (["ratio=0"], ["ratio=0", "fraction of parameters that is removed", "greater than 0"]),
    (["ratio=1.5"], ["ratio=1.5", "less than 1"]),
    (["ratio=half"], ["ratio=half", "valid number"]),
    (["seed=abc"], ["seed=abc", "valid integer"]),
    (["select.include=null"], ["select.include=None", "valid string"]),
    (["kernel.r=2.5"], ["kernel.r=2.5", "whole number from 1"]),
    (["solver.steps=1e2"], ["solver.steps=100.0", "whole number from 0"]),
    (["task.max_windows=2.5"], ["task.max_windows=2.5", "whole number from 1"]),
    (["select.include=."], ["lm_head shares its weight", "select.exclude='lm_head'"]),
    (["ratio=0.99"], ["ratio=0.99", "k_proj", "use ratio=0.936"]),
    (["select.include=blocks"], ["select.include=blocks", "model.layers.0.self_attn.q_proj"]),
    (["select.exclude=."], ["select.exclude=.", "excludes all 14"]),
    (["data=wikitext2"], ["data=wikitext2", "data.path="]),
    (["device=tpu"], ["device=tpu", "allowed: auto, cpu, cuda"]),
    (["device=cuda:9"], ["device=cuda:9", "use device=cpu"]),
    (["dtype=float12"], ["dtype=float12", "'float32', 'bfloat16' or 'float16'"]),
    (["solver.start=wram"], ["solver.start=wram", "allowed: warm, random"]),
    (["kernel=spline", "kernel.degree=7"], ["kernel.degree=7", "allowed: 1, 2, 3"]),
    (["task.window=4096"], ["task.window=4096", "2048 tokens"]),
    (["task.window=1"], ["task.window"]),
    (["model=llama7b", "model.path=/no/such"], ["model.path=/no/such", "is not a folder"]),
    (["model=llama7b"], ["huggyllama/llama-7b", "model.path=", "13.5 GB", "licence", "data.path=<", "or use data=sotu"]),
    (["model=llama7b", "method=svd_llm"], ["give calibration.path=<file or folder>, or use calibration=sotu"]),
    (["model=causal_lm"], ["model.path is missing", "give model.path=<folder", "config.json", "tokeniser"]),
    (["model=causal_lm", "model.path=conf"], ["model.path=conf has no config.json"]),
    (["data=wikitext2", "data.path=/no/such"], ["data.path=/no/such"]),
    (["model=tiny_swin", "task=language_modelling", "data=sotu"], ["task=language_modelling", "reads images", "task=imagenet"]),
    (["data=digits"], ["task=language_modelling needs text", "data=sotu"]),
    (["method.loss=both"], ["method.loss=both", "allowed: weight, activation"]),
    (["method=asvd", "method.alpha=-1"], ["method.alpha=-1", "0 or more"]),
    (["statistics.windows=0"], ["statistics.windows=0", "greater than or equal to 1"]),
    (["statistics.collect=[grams]"], ["grams", "'gram', 'magnitude' or 'fisher'"]),
]


@pytest.mark.parametrize("arguments, expected", ERRORS, ids=lambda value: " ".join(value) if "=" in value[0] else "")
def test_a_request_that_cannot_be_met_says_what_is_allowed_before_any_work(run_here, tmp_path, arguments, expected):
    with pytest.raises(UserError) as error:
        run_here(*replaced(TINY, *arguments))
    assert all(text in str(error.value) for text in expected), error.value
    assert not records(tmp_path)


REFUSED = [
    (["ratio=1.5"], ["error: ratio=1.5"]),
    (["--ratio", "0.5"], ["error: --ratio is no option", "ratio=0.5"]),
    (["kernel=foo"], ["piecewise", "phase"]),
    (["rato=0.5"], ["rato is not a setting", "did you mean ratio?", "select"]),
    (["solver.step=5"], ["did you mean solver.steps?", "solver.lr"]),
    (["track.mode=online"], ["track.mode needs track=wandb on the command line"]),
    (["data.path=/x"], ["data.path needs ", " or data=wikitext2"]),
    (["refine.epochs=3"], ["refine.epochs needs refine=block on the command line"]),
    (["data=[sotu,wikitext2]"], ["two sets of the same kind", "-m data=sotu,wikitext2"]),
    (["+refine.epochs=3"], ["write refine.epochs=3", "needs refine=block"]),
    (["method.linear_share=0.1"], ["needs method=hybrid"]),
]


@pytest.mark.parametrize("arguments, expected", REFUSED, ids=lambda value: " ".join(value) if "=" in value[0] else "")
def test_the_command_line_refuses_in_words_with_an_exit_code_and_no_traceback(cli, tmp_path, arguments, expected):
    fresh = arguments in (["ratio=1.5"], ["rato=0.5"])
    result = cli(*replaced(TINY, *arguments), check=False, fresh=fresh)
    said = result.stdout + result.stderr
    assert result.returncode == (2 if "ratio=1.5" in arguments else 1)
    assert all(text in said for text in expected), said
    assert "Traceback" not in said and "To append" not in said
    assert not records(tmp_path)


def test_a_choice_of_a_group_is_not_called_an_unknown_setting():
    (said,) = unknown_settings(["experiment=demo", "solver.step=5"])  # a refused command line also has settings that exist
    assert said.startswith("solver.step is not a setting; did you mean solver.steps?\nallowed: solver.")


def test_text_shorter_than_a_window_fails_with_its_length_and_a_failed_record(run_here, tmp_path):
    (tmp_path / "short.txt").write_text("a few words\n")
    with pytest.raises(UserError, match=r"12 tokens, less than one task\.window=64"):
        run_here(*TINY, "data=wikitext2", f"data.path={tmp_path / 'short.txt'}")
    assert only_record(tmp_path)["status"] == "failed"


def test_text_for_retraining_that_is_shorter_than_a_sample_is_refused_before_anything_is_measured(run_here, tmp_path):
    (tmp_path / "short.txt").write_text("a few words\n")
    short = ["calibration=wikitext2", f"calibration.path={tmp_path / 'short.txt'}", "retrain.steps=2", "retrain.length=64"]
    with pytest.raises(UserError, match=r"shorter than one sample of 64 tokens.*retrain\.length"):
        run_here(*TINY, *short)
    record = only_record(tmp_path)
    assert record["status"] == "failed" and not record["metrics"]


def test_a_measured_text_shorter_than_a_retraining_sample_is_refused_before_anything_is_fitted(run_here, tmp_path):
    (tmp_path / "short.txt").write_text("a few words\n" * 20)
    short = [
        "data=wikitext2",
        f"data.path={tmp_path / 'short.txt'}",
        "retrain.steps=2",
        "retrain.length=512",
        "retrain.watch=1",
    ]
    with pytest.raises(UserError, match=r"data=wikitext2 is shorter than one sample of 512 tokens.*retrain\.length"):
        run_here(*TINY, *short)
    assert not only_record(tmp_path)["metrics"] and not (tmp_path / "cache" / "fits").exists()


@pytest.mark.parametrize("wrong", ["solver.optimiser.betas=[1.0,0.99]", "solver.optimiser._target_=torch.optim.SGD"])
def test_an_optimiser_that_cannot_be_built_is_refused_before_anything_is_loaded(run_here, wrong):
    with pytest.raises(UserError, match=r"solver\.optimiser cannot be built: .*(beta|argument)"):
        run_here(*FAST, wrong, "dry_run=true")


def test_another_architecture_with_the_same_weights_is_measured_again(run_here, tmp_path):
    """The number of heads does not change the shape of a weight, so only the configuration shows the difference."""
    for heads in (4, 2):
        run_here(*replaced(FAST, "model=tiny_opt"), f"model.architecture.num_attention_heads={heads}")
    four, two = (r["metrics"]["dense"]["language_modelling"]["sotu"] for r in records(tmp_path))
    assert four["nll"] != two["nll"]


def test_a_changed_data_file_is_a_new_run(run_here, tmp_path):
    text = tmp_path / "wiki.test.raw"
    for content in ("one two three " * 40, "four five six " * 40):
        text.write_text(content)
        run_here(*FAST, "data=wikitext2", f"data.path={tmp_path}")
    assert len(records(tmp_path)) == 2


def test_a_model_folder_that_save_pretrained_wrote_is_a_model(run_here, tmp_path):
    config = OPTConfig(
        vocab_size=99,
        hidden_size=32,
        word_embed_proj_dim=32,
        ffn_dim=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    folder = tmp_path / "model"
    OPTForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({"the": 1, "?": 0}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?").save_pretrained(folder)
    with pytest.raises(UserError, match=r"vocab_size=50272, but the weights in .*=99; .*model=causal_lm model\.path="):
        run_here(*replaced(FAST, "model=opt_125m", "data=sotu"), f"model.path={folder}")
    run_here(*replaced(FAST, "model=causal_lm", "data=sotu"), f"model.path={folder}")
    assert only_record(tmp_path)["parameters"]["selected_before"] == 2 * (4 * 32 * 32 + 2 * 32 * 64)
