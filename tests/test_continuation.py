"""Tests of the text that the models of a run write after its prompt."""

import pytest
import torch

from nla.compressed.surgery import swap
from nla.kernels.gaussian import Gaussian
from nla.machine.errors import UserError
from nla.matrix.triplets import Triplets
from nla.stages.continue_prompt import TOKENS, continuation, decoded
from nla.terms.kernel_term import KernelTerm
from tests.conftest import TINY, make_model


@pytest.mark.parametrize("name", ["tiny_llama", "tiny_opt"])
def test_a_continuation_is_the_most_likely_token_after_all_earlier_ones_each_time(name, tmp_path):
    model = make_model(name, tmp_path)
    tokens = model.encode("We hold")
    for _ in range(TOKENS):  # without a cache
        with torch.no_grad():
            tokens = torch.cat((tokens, model.logits(tokens[None])[:, -1].argmax(-1)))
    assert continuation(model, "We hold", TOKENS) == model.tokenizer.decode(tokens[7:])


def test_a_layer_without_thin_factors_is_dense_only_while_the_model_writes(tmp_path):
    module = make_model("tiny_llama", tmp_path).module
    name = "model.layers.0.mlp.up_proj"
    weight = module.get_submodule(name).weight.detach()
    term = KernelTerm(Gaussian(), Triplets(torch.randn(80, 3, 1), torch.randn(48, 3, 1), torch.randn(3)))
    swap(module, {name: term})
    layer = module.get_submodule(name)
    with decoded(module):
        assert torch.equal(module.get_submodule(name).weight, term.dense()) and term.dense().shape == weight.shape
    assert module.get_submodule(name) is layer


def test_the_same_request_says_the_same_and_a_prompt_can_be_chosen_or_left_out(run_here, tmp_path):
    fast = [*TINY, "ratio=0.5", "method=svd"]
    first = run_here(*fast, "prompt=In the beginning")
    (tmp_path / "runs").rename(tmp_path / "gone")
    assert run_here(*fast, "prompt=In the beginning").continuations == first.continuations
    assert len(list((tmp_path / "cache" / "continuations").iterdir())) == 2
    assert run_here(*fast, "prompt=null").continuations == {}
    with pytest.raises(UserError, match=r"prompt= has 2024 tokens; allowed: 1 to 2023"):
        run_here(*fast, f"prompt={'x' * 2024}")
