"""Let the current language model continue a prompt, so that a reader sees what its figures mean."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from nla.compressed.layer import CompressedLinear
from nla.harness.record import RunRecord
from nla.harness.request import PreparedRun
from nla.machine.cache import digest
from nla.machine.errors import UserError
from nla.machine.provenance import code_digest
from nla.models.base import LanguageModel, Model

TOKENS = 25  # length of a continuation
# every value that a model's generation config may set, so that all models continue in the same way
GREEDY = {"do_sample": False, "num_beams": 1, "repetition_penalty": 1.0, "temperature": 1.0, "top_p": 1.0, "top_k": 50}


def continue_prompt(prepared: PreparedRun, record: RunRecord, model: Model, stage: str, state: str) -> None:
    """Add the continuation of the run's prompt to the record. That of a model in the same state comes from the cache.

    Args:
        stage: `dense`, `compressed` or `retrained`.
        state: digest of the model, see `nla.stages.evaluate.state_of`.

    Raises:
        UserError: the prompt leaves no room for a continuation in what the model can read.
    """
    prompt = prepared.values.get("prompt")
    if prompt is None or not isinstance(model, LanguageModel):
        return
    tokens, limit = model.encode(prompt), prepared.inventory.limit
    length = len(tokens)
    if not 0 < length <= limit - TOKENS:
        raise UserError(
            f"prompt= has {length} tokens; allowed: 1 to {limit - TOKENS} ({TOKENS} of the {limit} are for its end)"
        )
    key = digest([state, tokens.tolist(), TOKENS, code_digest(__name__)])
    known = prepared.cache.load_json("continuations", key)
    if known is None:
        with decoded(model.module):
            known = continuation(model, prompt, TOKENS)
        prepared.cache.store_json("continuations", key, known)
    record.continuations[stage] = known


@torch.inference_mode()
def continuation(model: LanguageModel, prompt: str, tokens: int) -> str:
    """What the model writes after the prompt: greedily, with a KV cache, until `tokens` tokens or the end of its text."""
    start = model.encode(prompt)[None].to(next(model.module.parameters()).device)
    end = model.tokenizer.eos_token_id
    written = model.module.generate(  # type: ignore[operator]
        start, attention_mask=torch.ones_like(start), max_new_tokens=tokens, use_cache=True, pad_token_id=end, **GREEDY
    )
    return model.tokenizer.decode(written[0, start.shape[1] :], skip_special_tokens=True)


@contextmanager
def decoded(module: nn.Module) -> Iterator[None]:
    """Context in which layers without thin factors are dense: they would compute their whole matrix again for each token."""
    layers = {
        name: layer
        for name, layer in module.named_modules()
        if isinstance(layer, CompressedLinear) and layer.term.rank_bound() is None
    }
    for name, layer in layers.items():
        module.set_submodule(name, layer.dense())
    try:
        yield
    finally:
        for name, layer in layers.items():
            module.set_submodule(name, layer)
