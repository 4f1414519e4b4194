"""What every source of models offers: an inventory without weights, and the model itself."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import astuple, dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from nla.machine.cache import Cache, digest
from nla.machine.errors import UserError
from nla.machine.provenance import code_digest, computing_packages
from nla.models.select import LinearSpec, linear_specs

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Sample(NamedTuple):
    """One input of a model, a batch of one: token ids (1, tokens) or images (1, channels, height, width); and its targets."""

    inputs: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Sample":
        return Sample(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model in evaluation mode, and its tokeniser (of transformers)."""

    module: nn.Module
    tokenizer: Any
    reads = "text"

    def encode(self, text: str) -> Tensor:
        """text -> token ids (tokens,)"""
        return self.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]

    def logits(self, tokens: Tensor) -> Tensor:
        """(batch, tokens) -> (batch, tokens, vocabulary)"""
        return self.module(tokens, use_cache=False).logits

    def loss(self, sample: Sample) -> Tensor:
        """Mean negative log-likelihood (nats) of each token given those before it; the targets are the inputs."""
        return self.loss_of(self.logits(sample.inputs), sample)

    def loss_of(self, logits: Tensor, sample: Sample) -> Tensor:
        """The same of logits that are known: (batch, tokens, vocabulary) -> ()"""
        return cross_entropy(logits[:, :-1].flatten(0, 1).float(), sample.targets[:, 1:].flatten())


@dataclass(frozen=True)
class VisionModel:
    """An image classifier in evaluation mode, and what turns an image (PIL) into its input (channels, height, width)."""

    module: nn.Module
    transform: Callable[[Any], Tensor]
    reads = "images"

    def logits(self, images: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, classes)"""
        return self.module(images)

    def loss(self, sample: Sample) -> Tensor:
        """Mean cross entropy (nats); targets (batch,) are classes."""
        return self.loss_of(self.logits(sample.inputs), sample)

    def loss_of(self, logits: Tensor, sample: Sample) -> Tensor:
        """The same of logits that are known: (batch, classes) -> ()"""
        return cross_entropy(logits.float(), sample.targets)


Model = LanguageModel | VisionModel


@dataclass(frozen=True)
class Inventory:
    """What is known of a model without its weights. `limit`: the longest text (tokens) or the number of classes."""

    linears: list[LinearSpec]
    parameters: int
    reads: Literal["text", "images"]
    limit: int


class ModelSource(ABC):
    """A source of one model."""

    reads: Literal["text", "images"]

    @abstractmethod
    def configuration(self, cache: Cache) -> dict[str, Any]:
        """The whole architecture; no weights are touched."""

    @abstractmethod
    def empty(self, configuration: dict[str, Any]) -> tuple[nn.Module, int]:
        """The model of this configuration on the meta device, and the inventory's `limit`."""

    @abstractmethod
    def load(self, device: str, dtype: str, cache: Cache) -> Model:
        """The model with its weights."""

    @abstractmethod
    def check(self, dtype: str, cache: Cache) -> None:
        """Raise UserError, in one sentence, if load() could not succeed."""

    def identity(self, cache: Cache) -> str:
        """What the configuration does not say of the weights, for the signature of a run."""
        return ""

    def inventory(self, cache: Cache) -> Inventory:
        """Linear layers and counts, from the architecture on the meta device; remembered, for importing takes seconds."""
        configuration = self.configuration(cache)
        key = digest([configuration, computing_packages(), code_digest(type(self).__module__)])
        known = cache.load_json("inventories", key)
        if known is None:
            try:
                model, limit = self.empty(configuration)
            except (KeyError, ValueError, TypeError, AttributeError, RuntimeError) as error:
                raise UserError(f"the model's configuration describes no model that can be built: {error!r}") from error
            known = {
                "linears": [astuple(spec) for spec in linear_specs(model)],
                "parameters": sum(p.numel() for p in model.parameters()),
                "limit": limit,
            }
            cache.store_json("inventories", key, known)
        return Inventory([LinearSpec(*row) for row in known["linears"]], known["parameters"], self.reads, known["limit"])
