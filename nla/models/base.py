"""The interface of a source of models: an inventory without weights, and the model itself."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import astuple, dataclass
from textwrap import shorten
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.modules.module import register_module_module_registration_hook

from nla.machine.cache import Cache, digest
from nla.machine.errors import UserError
from nla.machine.provenance import code_digest, computing_packages
from nla.models.select import LinearSpec, linear_specs, part_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
MOST_MODULES = 10_000  # a second's work; 750 layers of LLaMA have as many


class Sample(NamedTuple):
    """Inputs and targets. Inputs are token ids (batch, tokens) or images (batch, channels, height, width); often batch = 1."""

    inputs: Tensor
    targets: Tensor

    def to(self, device: torch.device) -> "Sample":
        return Sample(self.inputs.to(device), self.targets.to(device))


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model in evaluation mode, and its transformers tokeniser."""

    module: nn.Module
    tokenizer: Any
    reads = "text"

    def encode(self, text: str) -> Tensor:
        """text -> token ids (tokens,)"""
        return self.tokenizer(text, return_tensors="pt", verbose=False)["input_ids"][0]

    def tokenizer_identity(self) -> str:
        """A digest of all that decides which tokens a text has."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        rules = self.tokenizer.get_vocab() if backend is None else backend.to_str()
        return digest([rules, {name: str(token) for name, token in self.tokenizer.special_tokens_map.items()}])

    def logits(self, tokens: Tensor) -> Tensor:
        """(batch, tokens) -> (batch, tokens, vocabulary)"""
        return self.module(tokens, use_cache=False).logits

    def loss(self, sample: Sample) -> Tensor:
        """Mean negative log-likelihood (nats) of each token given those before it: (). The targets are the inputs."""
        return self.loss_of(self.logits(sample.inputs), sample)

    def loss_of(self, logits: Tensor, sample: Sample) -> Tensor:
        """`loss` from logits that are already computed: (batch, tokens, vocabulary) -> ()"""
        return cross_entropy(logits[:, :-1].flatten(0, 1).float(), sample.targets[:, 1:].flatten())


@dataclass(frozen=True)
class VisionModel:
    """An image classifier in evaluation mode, and the transform from a PIL image to its input (channels, height, width)."""

    module: nn.Module
    transform: Callable[[Any], Tensor]
    reads = "images"

    def logits(self, images: Tensor) -> Tensor:
        """(batch, channels, height, width) -> (batch, classes)"""
        return self.module(images)

    def loss(self, sample: Sample) -> Tensor:
        """Mean cross entropy (nats): (). The targets (batch,) are classes."""
        return self.loss_of(self.logits(sample.inputs), sample)

    def loss_of(self, logits: Tensor, sample: Sample) -> Tensor:
        """`loss` from logits that are already computed: (batch, classes) -> ()"""
        return cross_entropy(logits.float(), sample.targets)


Model = LanguageModel | VisionModel


@dataclass(frozen=True)
class Inventory:
    """A description of a model, made without its weights.

    Attributes:
        linears: all linear layers.
        parameters: number of parameters.
        parts: which of the parts `norms` and `biases` of `retrain.train` there are.
        reads: kind of the inputs.
        limit: length of the longest text that the model can read (tokens), or number of classes.
    """

    linears: list[LinearSpec]
    parameters: int
    parts: list[str]
    reads: Literal["text", "images"]
    limit: int


@contextmanager
def few_modules() -> Iterator[None]:
    """Context in which a model of more than MOST_MODULES modules is an error, because building it would take minutes."""
    made = 0

    def count(parent: nn.Module, name: str, module: nn.Module | None) -> None:
        nonlocal made
        made += 1
        if made > MOST_MODULES:
            raise UserError(f"the model's configuration describes more than {MOST_MODULES} modules; use fewer layers")

    hook = register_module_module_registration_hook(count)
    try:
        yield
    finally:
        hook.remove()


class ModelSource(ABC):
    """A source that one model is loaded from."""

    reads: Literal["text", "images"]
    training: Any = None  # the data set (`tasks.data.base.Data`) that the harness trains the model on, if it does

    @abstractmethod
    def configuration(self, cache: Cache) -> dict[str, Any]:
        """The whole architecture, as plain values. No weights are read."""

    @abstractmethod
    def empty(self, configuration: dict[str, Any]) -> tuple[nn.Module, int]:
        """The model of this configuration on the meta device, and the inventory's `limit`."""

    @abstractmethod
    def load(self, device: str, dtype: str, cache: Cache) -> Model:
        """The model with its weights."""

    @abstractmethod
    def check(self, dtype: str, cache: Cache) -> None:
        """Raise UserError, with one sentence, if load() cannot succeed."""

    def inspect(self, cache: Cache) -> None:  # noqa: B027 (most sources have nothing to inspect)
        """Raise UserError, with one sentence, if files on this machine cannot be loaded as this model. It takes seconds.

        It is called first, because digests of large files take longer.
        """

    def identity(self, cache: Cache) -> str:
        """Digest of the weights for a run's signature; empty if the configuration determines the weights."""
        return ""

    def inventory(self, cache: Cache) -> Inventory:
        """The inventory, from the architecture on the meta device. It is cached, because importing a model takes seconds.

        Raises:
            UserError: no model can be built from the configuration.
        """
        configuration = self.configuration(cache)
        key = digest([configuration, computing_packages(), code_digest(type(self).__module__)])
        known = cache.load_json("inventories", key)
        if known is None:
            try:
                with few_modules():
                    model, limit = self.empty(configuration)
            except UserError:
                raise
            except Exception as error:  # what the makers of models raise for a wrong value is not known
                reason = shorten(repr(error), 300)
                raise UserError(f"the model's configuration describes no model that can be built: {reason}") from error
            empty = [spec.name for spec in linear_specs(model) if not spec.n_params]
            if empty:
                raise UserError(f"the model's configuration gives {empty[0]} a size of 0; correct its widths")
            parts = {part_of(module, name) for module in model.modules() for name, _ in module.named_parameters(recurse=False)}
            known = {
                "linears": [astuple(spec) for spec in linear_specs(model)],
                "parameters": sum(p.numel() for p in model.parameters()),
                "parts": sorted(filter(None, parts)),
                "limit": limit,
            }
            cache.remember("inventories", key, known)
        linears = [LinearSpec(*row) for row in known["linears"]]
        return Inventory(linears, known["parameters"], known["parts"], self.reads, known["limit"])
