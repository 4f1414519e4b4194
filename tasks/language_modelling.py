"""Perplexity of a causal language model on running text."""

import math
import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from nla.cache import Journal
from nla.errors import UserError, require_positive
from nla.memory import PeakMemory
from nla.models.causal_lm import LanguageModel
from nla.workers import ordered_map
from tasks.text import Text

CHUNK = 256  # tokens whose log-probabilities are in fp32 at once


class LanguageModelling:
    """Documents joined, tokenised once, cut into disjoint windows; all but the first token of a window are scored.

    The tail that fills no window is dropped. A window whose loss is not finite makes the perplexity infinite.

    Args:
        window: tokens in a window.
        max_windows: only the first so many, or all (null).
    """

    name = "language_modelling"

    def __init__(self, data: Text, window: int, max_windows: int | None) -> None:
        require_positive("task.window", window - 1)
        require_positive("task.max_windows", 1 if max_windows is None else max_windows)
        self.data, self.window, self.max_windows = data, window, max_windows

    def check(self, max_positions: int) -> None:
        """Raise UserError if the windows do not fit the model or the data is not there."""
        if self.window > max_positions:
            raise UserError(f"task.window={self.window} is longer than the {max_positions} tokens the model can read")
        self.data.check()

    def windows(self, model: LanguageModel) -> list[Tensor]:
        tokens = model.encode(self.data.joined())
        count = len(tokens) // self.window
        if count == 0:
            raise UserError(f"data={self.data.name} has {len(tokens)} tokens, less than one task.window={self.window}")
        return list(tokens[: count * self.window].view(count, self.window)[: self.max_windows])

    def evaluate(self, model: LanguageModel, journal: Journal, label: str) -> dict[str, float]:
        """perplexity; nll (nats per token); tokens scored, windows, infinite_windows; tokens_per_second, peak_bytes.

        Windows already in the journal are not computed again.
        """
        windows, results = self.windows(model), journal.read()
        missing = [i for i in range(len(windows)) if i not in results]
        device = next(model.module.parameters()).device

        def score(i: int) -> dict[str, float]:
            return score_window(model, windows[i].to(device))

        scored = zip(missing, ordered_map(score, missing, device), strict=True)
        done = len(windows) - len(missing)
        for i, result in tqdm(scored, label, len(windows), initial=done, unit="window", dynamic_ncols=True):
            journal.append(i, result)
            results[i] = result
        return summary([results[i] for i in range(len(windows))], self.window - 1)


@torch.inference_mode()
def score_window(model: LanguageModel, tokens: Tensor) -> dict[str, float]:
    """Summed negative log-likelihood (nats) of tokens[1:] given what is before them, seconds and peak bytes."""
    begun = time.perf_counter()
    with PeakMemory(tokens.device) as memory:
        logits = model.module(tokens[None], use_cache=False).logits[0, :-1]  # (window - 1, vocabulary)
        nll = 0.0
        for scores, targets in zip(logits.split(CHUNK), tokens[1:].split(CHUNK), strict=True):
            nll += float(cross_entropy(scores.float(), targets, reduction="sum"))
    return {
        "nll": nll if math.isfinite(nll) else math.inf,
        "seconds": time.perf_counter() - begun,
        "peak_bytes": memory.peak_bytes,
    }


def summary(results: list[dict[str, Any]], scored: int) -> dict[str, float]:
    """Figures of all windows, each with `scored` tokens."""
    tokens = scored * len(results)
    nll = sum(r["nll"] for r in results) / tokens
    return {
        "perplexity": math.exp(nll) if nll < 700 else math.inf,
        "nll": nll,
        "tokens": tokens,
        "windows": len(results),
        "infinite_windows": sum(not math.isfinite(r["nll"]) for r in results),
        "tokens_per_second": tokens / sum(r["seconds"] for r in results),
        "peak_bytes": max(r["peak_bytes"] for r in results),
    }
