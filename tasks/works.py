"""The work that task=latency times: reading a prompt, writing a token, reading images; and the parameters that it reads."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from nla.machine.errors import UserError

Work = Callable[[], Tensor]


def reading_prompt(module: nn.Module, tokens: Tensor) -> Work:
    """From a prompt (1, tokens) to its first new token (1,) and the KV cache, as `generate` begins."""
    options = last_logits(module)

    def work() -> Tensor:
        return module(tokens, use_cache=True, **options).logits[:, -1].argmax(-1)

    return work


def decoding(module: nn.Module, context: Tensor) -> Work:
    """From one token of each text and the KV cache of its context (batch, tokens) to the next tokens (batch,).

    The cache is cut to the context again after each step.

    Raises:
        UserError: the model's cache cannot be cut.
    """
    options, name = last_logits(module), cache_name(module)
    cache = module(context, use_cache=True, **options)[name]
    if not hasattr(cache, "crop"):
        raise UserError(
            f"task=latency needs a KV cache that can be cut, and {type(module).__name__} has {type(cache).__name__}; "
            "use task=forward_cost"
        )
    last = context[:, -1:]

    def work() -> Tensor:
        logits = module(last, use_cache=True, **{name: cache}, **options).logits
        cache.crop(-1)  # the token that was just added
        return logits[:, -1].argmax(-1)

    return work


def reading_images(module: nn.Module, images: Tensor) -> Work:
    """From images (batch, channels, height, width) to logits (batch, classes)."""
    return lambda: module(images)


def last_logits(module: nn.Module) -> dict[str, Any]:
    """The argument with which a model of transformers computes logits of the last token only, as `generate` does."""
    return {"logits_to_keep": 1} if "logits_to_keep" in arguments(module) else {}


def cache_name(module: nn.Module) -> str:
    """What a model of transformers calls its KV cache, as argument and as output. Older versions: past_key_values."""
    return "cache" if "cache" in arguments(module) else "past_key_values"


def arguments(module: nn.Module) -> Mapping[str, inspect.Parameter]:
    """The arguments of the model's forward(), also if torch.compile has wrapped it."""
    return inspect.signature(getattr(module, "_orig_mod", module).forward).parameters


def parameter_bytes(module: nn.Module) -> int:
    """Bytes of the parameters and buffers that a forward pass reads.

    That is all, except the tables of embeddings, of which it reads some rows. A table that is also the last layer's matrix
    (tied embeddings) is read whole.
    """
    others = [m for m in module.modules() if not isinstance(m, nn.Embedding)]
    read = {id(t): t for m in others for t in (*m._parameters.values(), *m._buffers.values()) if t is not None}
    return sum(t.numel() * t.element_size() for t in read.values())
