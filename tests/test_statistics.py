"""Statistics of layer inputs, compared with plain hooks for all models, thread counts and sample orders; and their memory."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hydra.utils import instantiate
from torch import nn

from analysis.benchmarks.table import read_tables
from nla.machine.cache import Cache
from nla.machine.errors import NonFiniteError, UserError
from nla.machine.peak_memory import PeakMemory
from nla.models.base import Sample
from nla.models.select import linear_specs, select_linears
from nla.models.untrained import UntrainedModel
from nla.statistics.blocks import chain
from nla.statistics.collect import StatisticsStream, collect, mirror
from nla.statistics.fisher import fisher
from nla.statistics.store import StatisticsStore
from tasks.data.base import training_set
from tests import forked
from tests.conftest import configuration, options

BOTH = frozenset({"gram", "magnitude"})
CPU = torch.device("cpu")
TINY_MODELS = [name for name in options("model") if name.startswith("tiny")]


def tiny(name: str, tmp_path, count: int = 5, include: str = r"\blayers\."):
    """A model, the names of the chosen layers, and samples whose number is no multiple of a batch."""
    values = configuration(f"model={name}")
    model = instantiate(values.model, _convert_="all").load("cpu", "float32", Cache(tmp_path))
    samples = training_set("calibration", instantiate(values.statistics.data), model.reads).samples(model, count, 40, seed=1)
    layers = [spec.name for spec in select_linears(linear_specs(model.module), include, None)]
    return model, layers, samples


def collected(model, layers, samples, folder, offload=False) -> StatisticsStore:
    store = StatisticsStore(Cache(folder), "key")
    collect(model, layers, BOTH, samples, 0, store, offload)
    return store


def hooked(model, layers, samples) -> dict[str, torch.Tensor]:
    """{layer: its inputs (rows, in) in fp64}, from plain forward passes of one sample each."""
    caught: dict[str, list[torch.Tensor]] = {name: [] for name in layers}
    handles = [
        model.module.get_submodule(name).register_forward_pre_hook(
            lambda module, args, name=name: caught[name].append(args[0].flatten(0, -2).double())
        )
        for name in layers
    ]
    with torch.no_grad():
        for sample in samples:
            model.logits(sample.inputs)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in caught.items()}


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_statistics_are_those_of_the_inputs_of_a_plain_forward(name, offload, tmp_path):
    model, layers, samples = tiny(name, tmp_path)
    store = collected(model, layers, samples, tmp_path, offload)
    for layer, x in hooked(model, layers, samples).items():
        found = store.load(BOTH, layer, CPU)
        torch.testing.assert_close(found.gram.double(), x.T @ x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.magnitude.double(), x.abs().mean(0), rtol=1e-5, atol=1e-6)


def test_every_block_gets_the_masks_and_position_embeddings_that_the_model_gives_it(tmp_path):
    """Gemma 3 has blocks of two kinds: with a window of few tokens, and with all tokens and other position embeddings."""
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    small = {"vocab_size": 256, "hidden_size": 48, "intermediate_size": 80, "head_dim": 12, "sliding_window": 4}
    heads = {"num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128}
    source = UntrainedModel("tiny_gemma", 0, "float32", {"model_type": "gemma3_text", "layer_types": kinds, **small, **heads})
    _, _, samples = tiny("tiny_llama", tmp_path, count=30)  # the last batch is smaller than the others
    model = source.load("cpu", "float32", Cache(tmp_path))
    layers = [spec.name for spec in select_linears(linear_specs(model.module), r"\blayers\.", None)]
    store = collected(model, layers, samples, tmp_path)
    for layer, x in hooked(model, layers, samples).items():
        torch.testing.assert_close(store.load(BOTH, layer, CPU).gram.double(), x.T @ x, rtol=1e-4, atol=1e-3)


class Between(nn.Module):
    """Two blocks of one linear layer each; `between` is added before the second, and `extra` is its further argument."""

    def __init__(self, between: float, extra) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(), Block()])
        self.between, self.extra = between, extra

    def forward(self, x):
        x = self.blocks[0](x, None)
        return self.blocks[1](x + self.between if self.between else x, self.extra(x))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x, extra):
        return self.fc(x)


@pytest.mark.parametrize(
    ("between", "extra", "said"),
    [
        (0.0, lambda x: {"mask": [torch.ones(3), None, 2]}, None),
        (1.0, lambda x: None, r"changes what blocks\.1 reads between two blocks; use a method that reads no inputs"),
        (0.0, lambda x: {"embeddings": x}, r"blocks\.1 reads more than hidden states, masks and positions"),
    ],
)
def test_a_model_whose_blocks_cannot_be_run_one_by_one_is_refused(between, extra, said, tmp_path):
    module = Between(between, extra)
    model = SimpleNamespace(module=module, logits=module)
    samples = [Sample(torch.randn(1, 512, 4), torch.zeros(1)) for _ in range(6)]
    with pytest.raises(UserError, match=said) if said else nullcontext():
        collected(model, ["blocks.0.fc", "blocks.1.fc"], samples, tmp_path)


def test_blocks_that_are_never_called_are_refused(tmp_path):
    module = Between(0.0, lambda x: None)
    model = SimpleNamespace(module=module, logits=lambda x: x)
    with pytest.raises(UserError, match=r"the model does not call blocks\.0"):
        collected(model, ["blocks.0.fc", "blocks.1.fc"], [Sample(torch.randn(1, 512, 4), torch.zeros(1))], tmp_path)


class Calls(nn.Module):
    """A block that calls its layer `fc` so many times, or once for some inputs and never for others."""

    def __init__(self, times: int | None) -> None:
        super().__init__()
        self.times, self.fc, self.last = times, nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x):
        for _ in range(int(x[0, 0, 0] > 0) if self.times is None else self.times):
            x = self.fc(x)
        return self.last(x)


@pytest.mark.parametrize(("times", "said"), [(0, "called 0 times"), (2, "called 2 times"), (None, "called 0 times"), (1, None)])
@pytest.mark.parametrize("sequential", [False, True])
def test_a_layer_of_whose_inputs_some_would_be_missing_is_refused(times, said, sequential, tmp_path):
    module = nn.Module()
    module.blocks = nn.ModuleList([Calls(times), Calls(1)])
    model = SimpleNamespace(module=module, logits=lambda x: module.blocks[1](module.blocks[0](x)))
    samples = [Sample(sign * torch.ones(1, 512, 4), torch.zeros(1)) for sign in (1, 1, -1, -1)]
    layers = [f"blocks.{i}.{name}" for i in (0, 1) for name in ("fc", "last")]
    stream = StatisticsStream(model, layers, BOTH, samples, StatisticsStore(Cache(tmp_path), "key"), offload=False)
    with pytest.raises(UserError, match=rf"blocks\.0\.fc is {said} .*exclude='blocks") if said else nullcontext():
        for block in stream.blocks():
            for part in stream.parts(block) if sequential else [block.layers]:
                stream.measure(block, part)
            stream.advance(block)


def test_outputs_that_no_block_reads_are_not_kept(tmp_path):
    """Of a model that is its only block, they are logits."""
    model, _, samples = tiny("tiny_llama", tmp_path)
    store = StatisticsStore(Cache(tmp_path), "key")
    stream = StatisticsStream(model, ["model.layers.0.mlp.up_proj", "lm_head"], BOTH, samples, store, offload=False)
    (block,) = stream.blocks()
    stream.measure(block)
    assert block.module is model.module and stream.outputs == []


def test_layers_that_read_the_same_input_share_one_file(tmp_path):
    model, layers, samples = tiny("tiny_llama", tmp_path)
    store = collected(model, layers, samples, tmp_path)
    sources = {layer.rpartition(".")[2]: store.source("gram", layer).rpartition(".")[2] for layer in layers}
    assert sources == {
        **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "q_proj"),
        **dict.fromkeys(("gate_proj", "up_proj"), "gate_proj"),
        "o_proj": "o_proj",
        "down_proj": "down_proj",
    }


def test_a_chain_is_the_stack_that_holds_the_chosen_layers_or_the_whole_model(tmp_path):
    for include, expected in (
        (r"\blayers\.", ["model.layers.0", "model.layers.1"]),
        (r"layers\.0\.", ["model.layers.0"]),
        (r"layers\.1\.mlp", ["model.layers.0", "model.layers.1"]),
    ):
        model, layers, _ = tiny("tiny_llama", tmp_path, include=include)
        assert [block.name for block in chain(model, layers)] == expected
    head = SimpleNamespace(module=nn.Sequential(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))), logits=None)
    assert [block.name for block in chain(head, ["0.0", "0.1"])] == [""]  # no block is itself a chosen layer
    model, _, samples = tiny("tiny_llama", tmp_path)
    layers = ["model.layers.0.mlp.up_proj", "lm_head"]
    assert [block.module for block in chain(model, layers)] == [model.module]
    store = collected(model, layers, samples, tmp_path)
    x = hooked(model, layers, samples)["lm_head"]
    torch.testing.assert_close(store.load(BOTH, "lm_head", CPU).gram.double(), x.T @ x, rtol=1e-4, atol=1e-4)


def test_statistics_do_not_depend_on_the_thread_count_and_hardly_on_the_order_of_the_samples(tmp_path):
    model, layers, samples = tiny("tiny_llama", tmp_path, count=60)
    found = {}
    for name, threads, given in (("one", 1, samples), ("two", 2, samples), ("reversed", 1, samples[::-1])):
        torch.set_num_threads(threads)
        store = collected(model, layers, given, tmp_path / name)
        found[name] = {layer: store.load(BOTH, layer, CPU).gram for layer in layers}
    torch.set_num_threads(1)
    for layer in layers:
        assert torch.equal(found["one"][layer], found["two"][layer])
        distance = (found["one"][layer] - found["reversed"][layer]).norm() / found["one"][layer].norm()
        assert float(distance) < 1e-6


@pytest.mark.parametrize("method", ["fwsvd", "asvd", "svd_llm"])
def test_a_method_is_invariant_to_the_order_of_the_samples_to_one_in_a_million(method, tmp_path):
    model, layers, samples = tiny("tiny_llama", tmp_path, count=24)
    method = instantiate(configuration(f"method={method}").method, _convert_="all")
    weight = model.module.get_submodule(layers[-1]).weight
    errors = []
    for given in (samples, samples[::-1]):
        store = StatisticsStore(Cache(tmp_path / str(len(errors))), "key")
        collect(model, layers[-1:], method.needs, given, len(given), store, False)
        statistics = [store.load(method.needs, layers[-1], CPU)]
        (fit,) = method.compress([weight], 1500 * 32, statistics, torch.Generator())
        errors.append(fit.relative_error)
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_fisher_information_is_the_squared_gradient_of_each_sample_summed_over_outputs(name, tmp_path):
    model, layers, samples = tiny(name, tmp_path, count=3)
    found = fisher(model, layers, samples)
    expected = dict.fromkeys(layers, torch.zeros(()))
    for sample in samples:
        model.module.zero_grad()
        model.loss(sample).backward()
        for layer in layers:
            gradient = model.module.get_submodule(layer).weight.grad
            expected[layer] = expected[layer] + gradient.square().sum(0) / len(samples)
    for layer in layers:
        torch.testing.assert_close(found[layer], expected[layer], rtol=1e-4, atol=1e-12)
    assert all(p.requires_grad for p in model.module.parameters())


def test_layers_read_the_outputs_of_those_that_were_compressed_before_them(run_here, tmp_path):
    """In sequential SVD-LLM, all layers but the first three read what compressed layers return, and have other optima."""
    arguments = ["model=tiny_llama", "task.window=64", "task.max_windows=1", "track=none", "method=svd_llm"]
    arguments += ["statistics.windows=8", "statistics.length=32"]
    fits = {}
    for sequential in (False, True):
        record = run_here(*arguments, f"method.sequential={sequential}")
        fits[sequential] = {fit.name: fit.svd_llm_error for fit in record.fits}
    same = {name for name in fits[True] if fits[True][name] == fits[False][name]}
    assert same == {f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv"}


def test_one_pass_serves_all_methods_of_a_sweep(run_here, tmp_path, caplog):
    arguments = ["model=tiny_opt", "task.window=64", "task.max_windows=1", "track=none", "statistics.windows=8"]
    arguments += ["statistics.length=32", "statistics.collect=[gram,magnitude,fisher]"]
    run_here(*arguments, "method=svd_llm")
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "statistics").iterdir()}
    for method in ("asvd", "fwsvd"):
        assert run_here(*arguments, f"method={method}").status == "done"
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache" / "statistics").iterdir()} == files


def test_the_seed_the_windows_and_their_length_make_other_statistics_and_other_runs(run_here, tmp_path):
    arguments = ["model=tiny_llama", "task.window=64", "task.max_windows=1", "track=none", "method=asvd"]
    changes = [[], ["seed=1"], ["statistics.windows=9"], ["statistics.length=16"], ["statistics.offload=true"]]
    small = ["statistics.windows=8", "statistics.length=32"]
    found = {run_here(*arguments, *(s for s in small if s.split("=")[0] not in "".join(c)), *c).signature for c in changes}
    assert len(found) == 4  # statistics.offload changes no figure


def test_samples_are_windows_of_the_training_speeches_only(tmp_path):
    model, _, samples = tiny("tiny_llama", tmp_path, count=20)
    data = instantiate(configuration().data.text)
    text, held_out = data.training().joined(), data.joined()
    for sample in samples:
        words = model.tokenizer.decode(sample.inputs[0]).strip("\ufffd")
        assert sample.inputs.shape == (1, 40) and words in text and words not in held_out


def test_calibration_text_shorter_than_a_window_is_an_error(run_here, tmp_path):
    (tmp_path / "short.txt").write_text("a few words")
    calibration = ["calibration=wikitext2", f"calibration.path={tmp_path / 'short.txt'}", "calibration.text.lines=text"]
    with pytest.raises(UserError, match=r"calibration=wikitext2 .* 512 tokens; .*statistics\.length"):
        run_here("model=tiny_llama", "task.window=64", "task.max_windows=1", "track=none", "method=asvd", *calibration)


def test_inputs_that_are_not_finite_are_an_error_that_names_the_layer(tmp_path):
    model, layers, samples = tiny("tiny_llama", tmp_path)
    with torch.no_grad():
        model.module.get_submodule(layers[0]).weight[0, 0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"layers\.0\.self_attn\.o_proj: the (gram|magnitude)"):
        collected(model, layers, samples, tmp_path)


def test_a_damaged_statistic_is_collected_again(run_here, tmp_path, caplog):
    arguments = ["model=tiny_llama", "task.window=64", "task.max_windows=1", "track=none", "method=svd_llm"]
    arguments += ["statistics.windows=8", "statistics.length=32"]
    first = run_here(*arguments)
    path = sorted((tmp_path / "cache" / "statistics").glob("*.safetensors"))[0]
    path.write_bytes(path.read_bytes()[:-8])
    for old in (*(tmp_path / "cache" / "fits").iterdir(), *(tmp_path / "runs").glob("*/record.json")):
        old.unlink()
    again = run_here(*arguments)
    assert f"{path} is damaged" in caplog.text
    assert [fit.relative_error for fit in again.fits] == [fit.relative_error for fit in first.fits]


def test_collecting_holds_the_gram_matrices_of_one_block_and_one_group_of_inputs(tmp_path):
    """LLaMA-7B's shapes at a sixteenth of its width: more blocks need no more memory."""
    command = ["-m", "analysis.benchmarks.statistics_memory", "scale=0.0625"]
    for blocks in (1, 3):
        forked.finish([*command, f"blocks={blocks}", f"table={tmp_path / str(blocks)}.csv"])
    found = [{name: float(cell) for name, cell in table.rows[0].items()} for table in read_tables(tmp_path).values()]
    for figures in found:
        assert figures["gram_bytes"] < figures["peak_bytes"] < figures["gram_bytes"] + 2 * figures["group_bytes"]
    assert found[1]["blocks"] == 3 and found[1]["peak_bytes"] < 1.1 * found[0]["peak_bytes"]


def test_the_lower_triangle_of_a_gram_matrix_is_filled_in_place():
    gram = torch.randn(1000, 1000, generator=torch.Generator().manual_seed(0))
    whole = gram.triu() + gram.triu(1).T
    with PeakMemory(torch.device("cpu")) as memory:
        mirror(gram)
    assert torch.equal(gram, whole) and memory.peak_bytes < gram.nbytes / 2
