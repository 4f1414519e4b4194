"""The errors of compressed earlier blocks, which a fit can correct: the statistic, the target, and runs."""

import pytest
import torch
from torch import nn

from nla.machine.cache import Cache
from nla.machine.errors import UserError
from nla.matrix.inputs import Statistics
from nla.matrix.objective import DAMPING, Norms
from nla.statistics.collect import StatisticsStream
from nla.statistics.store import StatisticsStore
from tests.samples import normal
from tests.test_statistics import CPU, hooked, tiny

PARTS = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
SMALL = ["task.window=64", "task.max_windows=1", "track=none", "statistics.windows=80", "statistics.length=32"]


def test_cross_statistics_pair_the_inputs_behind_a_changed_block_with_those_of_the_dense_model(tmp_path):
    model, layers, samples = tiny("tiny_llama", tmp_path, count=60)
    dense = hooked(model, layers, samples)
    kinds, store = frozenset({"gram", "cross"}), StatisticsStore(Cache(tmp_path), "key")
    stream = StatisticsStream(model, layers, kinds, samples, store, offload=False, with_dense=True)
    first, second = stream.chain
    for block in stream.blocks():
        stream.measure(block, replaced=True)
        stream.advance_dense()
        if block is first:
            with torch.no_grad():
                model.module.get_submodule(first.layers[-1]).weight.mul_(0.5)
        stream.advance(block)
    changed = hooked(model, layers, samples)
    for layer in second.layers:
        x, z, found = changed[layer], dense[layer], store.load(kinds, layer, CPU)
        torch.testing.assert_close(found.cross.double(), z.T @ x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.gram.double(), x.T @ x, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(found.cross, found.gram, rtol=1e-3)
    for layer in first.layers:
        found = store.load(kinds, layer, CPU)
        torch.testing.assert_close(found.cross, found.gram, rtol=1e-4, atol=1e-4)


def test_layers_that_run_later_read_what_the_replaced_layers_of_their_block_return(tmp_path):
    model, layers, samples = tiny("tiny_llama", tmp_path, count=60)
    dense = hooked(model, layers, samples)
    kinds, store = frozenset({"gram", "cross"}), StatisticsStore(Cache(tmp_path), "key")
    stream = StatisticsStream(model, layers, kinds, samples, store, offload=False, with_dense=True)
    first, start = next(stream.blocks()), stream.dense.states
    before = {layer: model.module.get_submodule(layer) for layer in first.layers}
    parts = stream.parts(first)
    assert [[layer.rpartition(".")[2] for layer in part] for part in parts] == PARTS
    for part in parts:
        stream.measure(first, part, replaced=True)
        for layer in part:
            old = model.module.get_submodule(layer)
            model.module.set_submodule(layer, nn.Linear(old.in_features, old.out_features, bias=False, dtype=old.weight.dtype))
    changed = hooked(model, layers, samples)
    for layer in first.layers:
        x, z, found = changed[layer], dense[layer], store.load(kinds, layer, CPU)
        torch.testing.assert_close(found.gram.double(), x.T @ x, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(found.cross.double(), z.T @ x, rtol=1e-4, atol=1e-4)
        assert torch.allclose(found.cross, found.gram, rtol=1e-3) == (layer in parts[0])
    stream.advance_dense()
    for layer, module in before.items():
        model.module.set_submodule(layer, module)
    outputs = [stream.dense.through(first, state) for state in start]
    assert all(map(torch.equal, stream.dense.states, outputs))  # of the dense layers, although the model's were replaced


def statistics(z: torch.Tensor, x: torch.Tensor) -> Statistics:
    return Statistics(gram=x.T @ x, cross=z.T @ x)


def test_the_target_is_the_least_squares_solution_for_the_dense_outputs_with_a_penalty_for_leaving_the_weight():
    """T minimises ||T X^T - W Z^T||^2 + d ||T - W||^2: ordinary least squares with d rows more."""
    weight, z = normal(7, 5), normal(200, 5, seed=1)
    x = 0.7 * z + 0.3 * normal(200, 5, seed=2)
    penalty = (DAMPING * x.square().sum(0).mean()).sqrt() * torch.eye(5)
    expected = torch.linalg.lstsq(torch.cat([x, penalty]), torch.cat([z @ weight.T, penalty @ weight.T])).solution.T
    torch.testing.assert_close(Norms(weight, statistics(z, x), 1.0).outputs.weight, expected, rtol=1e-4, atol=1e-5)
    half = Norms(weight, statistics(z, x), 0.5).outputs.weight
    torch.testing.assert_close(half, (weight + expected) / 2, rtol=1e-4, atol=1e-5)


def test_where_all_inputs_are_zero_the_target_is_the_weight():
    weight, zeros = normal(4, 6), torch.zeros(50, 6)
    assert torch.equal(Norms(weight, statistics(zeros, zeros), 1.0).outputs.weight, weight)


def test_where_nothing_was_compressed_yet_the_target_is_the_weight():
    weight, x = normal(4, 6), normal(50, 6, seed=1)
    torch.testing.assert_close(Norms(weight, statistics(x, x), 1.0).outputs.weight, weight)
    assert torch.equal(Norms(weight, Statistics(gram=x.T @ x), 1.0).outputs.weight, weight)


def test_corrected_fits_bring_the_outputs_of_the_last_block_closer_to_those_of_the_dense_model(run_here):
    arguments = ["model=tiny_llama", "ratio=0.5", "method=svd_llm", "method.sequential=true", "refine=block", *SMALL]
    plain, corrected = (run_here(*arguments, f"method.correction={share}").refinement for share in ("0.0", "1.0"))
    assert corrected.error_before < plain.error_before


def test_nla_is_corrected_behind_compressed_layers_only(run_here):
    arguments = ["model=tiny_llama", "kernel=phase", "method=nla_outputs", "solver.steps=2", "method.sequential=true", *SMALL]
    plain, corrected = (run_here(*arguments, f"method.correction={share}").fits for share in ("0.0", "1.0"))
    changed = {a.name for a, b in zip(plain, corrected, strict=True) if abs(a.relative_error / b.relative_error - 1) > 1e-3}
    assert {fit.name for fit in plain} - changed == {f"model.layers.0.self_attn.{kind}_proj" for kind in "qkv"}


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["method.correction=0.5"], r"add method\.sequential=true"),
        (["method.correction=1.5", "method.sequential=true"], r"method\.correction=1\.5 must be a number from 0 to 1"),
    ],
)
def test_a_wrong_correction_is_refused(settings, message, run_here):
    with pytest.raises(UserError, match=message):
        run_here("model=tiny_llama", "method=svd_llm", *settings, *SMALL)
