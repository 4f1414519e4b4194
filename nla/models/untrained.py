"""Small models with random weights and a byte tokeniser: every code path in seconds, no figure worth keeping."""

from typing import Any

import torch
from torch import Tensor

from nla.cache import Cache
from nla.models.causal_lm import DTYPES, CausalLM, LanguageModel


class UntrainedModel(CausalLM):
    """Any transformers architecture with random weights from `weights_seed`."""

    def __init__(self, name: str, weights_seed: int, dtype: str, architecture: dict[str, Any]) -> None:
        self.architecture, self.weights_seed = dict(architecture), weights_seed

    def configuration(self, cache: Cache) -> dict[str, Any]:
        return self.architecture

    def check(self, dtype: str, cache: Cache) -> None:
        """Nothing can be missing."""

    def load(self, device: str, dtype: str, cache: Cache) -> LanguageModel:
        from transformers import AutoConfig, AutoModelForCausalLM

        settings = {key: value for key, value in self.architecture.items() if key != "model_type"}
        config = AutoConfig.for_model(self.architecture["model_type"], **settings)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.weights_seed)
            model = AutoModelForCausalLM.from_config(config)
        return LanguageModel(model.to(device, DTYPES[dtype]).eval(), encode_bytes)


def encode_bytes(text: str) -> Tensor:
    """UTF-8 bytes as token ids (tokens,)."""
    return torch.tensor(list(text.encode()), dtype=torch.long)
