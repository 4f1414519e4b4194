"""Perplexity of a causal language model on running text."""

import math
import time
from statistics import stdev
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from nla.machine.cache import Cache, digest, tensor_digest
from nla.machine.errors import UserError, require_integer
from nla.machine.peak_memory import PeakMemory
from nla.models.base import Inventory, LanguageModel
from tasks.base import STDERR, Figures, Task, resident_bytes, scored_in_parts
from tasks.data.text import Text

CHUNK = 256  # tokens whose logits are converted to fp32 at once


class LanguageModelling(Task):
    """Perplexity on running text. The documents are joined, tokenised once, and cut into disjoint windows.

    All tokens of a window except the first are scored. The rest of the text, shorter than a window, is dropped. A window whose
    loss is not finite makes the perplexity infinite.

    Args:
        window: tokens in a window.
        max_windows: measure only the first so many windows; null for all.
    """

    name = "language_modelling"
    reads = "text"
    data: Text

    def __init__(self, data: Text, window: int, max_windows: int | None) -> None:
        require_integer("task.window", window, 2)
        require_integer("task.max_windows", 1 if max_windows is None else max_windows, 1)
        self.data, self.window, self.max_windows = data, window, max_windows
        self.kept: tuple[LanguageModel, Tensor] | None = None

    def check(self, inventory: Inventory) -> None:
        super().check(inventory)
        if self.window > inventory.limit:
            raise UserError(f"task.window={self.window} is longer than the {inventory.limit} tokens the model can read")

    def windows(self, model: LanguageModel) -> Tensor:
        """All complete windows of the text: (windows, window) token ids, cut once for a model that is measured again.

        Raises:
            UserError: the text is shorter than one window.
        """
        if self.kept is None or self.kept[0] is not model:
            self.kept = model, self.cut(model)
        return self.kept[1]

    def cut(self, model: LanguageModel) -> Tensor:
        tokens = model.encode(self.data.joined())
        count = len(tokens) // self.window
        if count == 0:
            raise UserError(f"data={self.data.name} has {len(tokens)} tokens, less than one task.window={self.window}")
        return tokens[: count * self.window].view(count, self.window)

    def evaluate(self, model: LanguageModel, cache: Cache, state: str, label: str) -> dict[str, Figures]:  # type: ignore[override]
        """Figures as in `summary`. Each window is stored as soon as it is scored."""
        windows = self.windows(model)
        key = digest([state, tensor_digest(windows)])
        chosen, device = windows[: self.max_windows], next(model.module.parameters()).device

        def score(i: int) -> dict[str, float]:
            return score_window(model, chosen[i].to(device))

        results = scored_in_parts(score, len(chosen), cache, ("windows", key), device, (label, "window"))
        figures = summary(results, self.window - 1)
        figures |= {"windows_available": len(windows), "resident_bytes": resident_bytes(model.module)}
        return {self.data.name: figures}


@torch.inference_mode()
def score_window(model: LanguageModel, tokens: Tensor) -> dict[str, float]:
    """Summed negative log-likelihood (nats) of tokens[1:], each given the tokens before it; seconds; peak bytes."""
    begun = time.perf_counter()
    with PeakMemory(tokens.device) as memory:
        logits = model.logits(tokens[None])[0, :-1]  # (window - 1, vocabulary)
        nll = 0.0
        for scores, targets in zip(logits.split(CHUNK), tokens[1:].split(CHUNK), strict=True):
            nll += float(cross_entropy(scores.float(), targets, reduction="sum"))
    return {
        "nll": nll if math.isfinite(nll) else math.inf,
        "seconds": time.perf_counter() - begun,
        "peak_bytes": memory.peak_bytes,
    }


def summary(results: list[dict[str, Any]], scored: int) -> dict[str, float]:
    """perplexity with its standard error; nll (nats per token); tokens (scored); windows, infinite_windows (loss not finite);
    seconds and tokens_per_second of one worker (a thread, or the GPU); peak_bytes of one window."""
    tokens = scored * len(results)
    nll = sum(r["nll"] for r in results) / tokens
    seconds = sum(r["seconds"] for r in results)
    return perplexity(nll, [r["nll"] / scored for r in results]) | {
        "nll": nll,
        "tokens": tokens,
        "windows": len(results),
        "infinite_windows": sum(not math.isfinite(r["nll"]) for r in results),
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "peak_bytes": max(r["peak_bytes"] for r in results),
    }


def perplexity(mean: float, losses: list[float]) -> Figures:
    """exp(mean) and, if it is finite and of several windows, its standard error.

    To first order (the delta method) the error of exp(x) is exp(x) times that of x: here the sample deviation of the windows'
    losses, divided by the square root of their number. `tasks.base` says what it leaves out.

    Args:
        mean: of the losses.
        losses: nats per token of each window. All windows have as many tokens, so they count the same.
    """
    figure = math.exp(mean) if mean < 700 else math.inf
    if len(losses) == 1 or math.isinf(figure):
        return {"perplexity": figure}
    return {"perplexity": figure, "perplexity" + STDERR: figure * stdev(losses) / math.sqrt(len(losses))}
