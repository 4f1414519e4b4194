"""Small models with random weights and a byte tokeniser, for tests that run in seconds. Their figures are meaningless."""

from typing import Any

import torch

from nla.machine.cache import Cache
from nla.machine.errors import require_integer
from nla.models import vision
from nla.models.base import DTYPES, LanguageModel, VisionModel
from nla.models.causal_lm import CausalLM, from_architecture


class UntrainedModel(CausalLM):
    """A model of any transformers architecture, with random weights from `weights_seed`."""

    def __init__(self, name: str, weights_seed: int, dtype: str, architecture: dict[str, Any]) -> None:
        require_integer("model.weights_seed", weights_seed, 0)
        self.architecture, self.weights_seed = dict(architecture), weights_seed

    def configuration(self, cache: Cache) -> dict[str, Any]:
        return self.architecture

    def check(self, dtype: str, cache: Cache) -> None:
        """Always succeeds, because no file is needed."""

    def load(self, device: str, dtype: str, cache: Cache) -> LanguageModel:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.weights_seed)
            model = from_architecture(self.architecture)
        return LanguageModel(model.to(device, DTYPES[dtype]).eval(), byte_tokenizer())


class UntrainedVision(vision.ImageClassifier):
    """A model of any timm architecture, with random weights from `weights_seed`."""

    def __init__(self, name: str, weights_seed: int, dtype: str, architecture: dict[str, Any]) -> None:
        require_integer("model.weights_seed", weights_seed, 0)
        self.architecture, self.weights_seed = dict(architecture), weights_seed

    def configuration(self, cache: Cache) -> dict[str, Any]:
        return self.architecture

    def check(self, dtype: str, cache: Cache) -> None:
        """Always succeeds, because no file is needed."""

    def load(self, device: str, dtype: str, cache: Cache) -> VisionModel:
        return vision.classifier(vision.from_architecture(self.architecture, self.weights_seed), device, dtype)


def byte_tokenizer() -> Any:
    """A tokeniser whose token ids are the bytes of the text in UTF-8."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = byte_alphabet()
    tokenizer = Tokenizer(models.BPE(vocab={alphabet[byte]: byte for byte in range(256)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=alphabet[0], pad_token=alphabet[0])


def byte_alphabet() -> list[str]:
    """The 256 visible characters that stand for the bytes in the byte-level encoding of `tokenizers` (GPT-2's table)."""
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    spare = iter(range(0x100, 0x200))
    return [chr(byte) if byte in visible else chr(next(spare)) for byte in range(256)]
