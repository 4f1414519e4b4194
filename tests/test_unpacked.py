"""Terms of codes are the same in training: their matrix, their outputs, the gradient of their scales, and the way back."""

import pytest
import torch
from hydra.utils import instantiate

from nla.matrix.inputs import Statistics
from tests.conftest import composed


def term(method: str, dtype: torch.dtype):
    weight = torch.randn(24, 40, generator=torch.Generator().manual_seed(0)).to(dtype)
    x = torch.randn(200, 40, generator=torch.Generator().manual_seed(1))
    chosen = instantiate(composed(f"method={method}").method, _convert_="all")
    return chosen.compress_matrix(weight, 4 * weight.numel(), Statistics(gram=x.T @ x), torch.Generator().manual_seed(0)).term


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["gptq", "lq_lora", "quip", "svd_llm_int4"])
def test_a_term_in_training_has_the_same_matrix_and_gradients_and_leads_back(method, dtype):
    stored = term(method, dtype)
    trained = stored.trainable()
    near = {"rtol": 2e-2, "atol": 5e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(trained.dense(), stored.dense(), **near)
    x = torch.randn(5, 40, generator=torch.Generator().manual_seed(2)).to(dtype)
    torch.testing.assert_close(trained(x), stored(x), **(near | {"atol": 0.3 if dtype == torch.bfloat16 else 1e-3}))
    assert trained.bits() == stored.bits() and trained.state_dict().keys() == stored.state_dict().keys()
    if dtype == torch.float32:
        for one, other in zip(trained.parameters(), stored.parameters(), strict=True):
            found, expected = (torch.autograd.grad(t(x).square().sum(), p)[0] for t, p in ((trained, one), (stored, other)))
            torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-2)
    again = trained.packed()
    assert type(again) is type(stored) and again.dense().equal(stored.dense()) and again.config() == stored.config()


@pytest.mark.parametrize("method", ["gptq", "lq_lora"])
def test_scales_of_a_grid_take_16_bits_after_a_training_in_fp32_too(method):
    stored = term(method, torch.float32)
    trained, bits = stored.trainable(), stored.bits()
    with torch.no_grad():
        for p in trained.parameters():
            p.mul_(1.001)
    again = trained.packed()
    assert again.bits() == bits
    torch.testing.assert_close(again.dense(), trained.dense(), rtol=1e-2, atol=1e-2)
