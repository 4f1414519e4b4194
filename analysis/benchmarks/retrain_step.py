"""`python -m analysis.benchmarks.retrain_step [steps=6] [table=FILE.csv]`: time of a retraining step beside a plain one.

Both models have SmolLM2's shapes, random weights and half of the parameters removed. A step has 4 windows of 512 tokens. The
plain model has two nn.Linear in the place of each matrix, so that its matrix products are equal. It is trained on all windows
as one batch, with AdamW and a clipped gradient, and the same parameters are frozen. Both take turns in one process, and
multiply in fp32 (`retrain.products=float32`). The first step of each is not counted.
"""

import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor, nn

from analysis.benchmarks.command import given, main
from nla.budget.adaptive import Adaptive, Tightening
from nla.budget.schedule import Cubic
from nla.compressed.contents import kernel_terms
from nla.compressed.layer import CompressedLinear
from nla.kernels.base import Kernel
from nla.kernels.linear import Linear
from nla.kernels.piecewise import Piecewise
from nla.machine.cache import Cache
from nla.machine.errors import UserError
from nla.matrix.triplets import Triplets
from nla.models.base import LanguageModel, Sample
from nla.models.causal_lm import from_architecture
from nla.models.select import linear_specs, select_linears
from nla.retrain.constraints import Constraints
from nla.retrain.history import History
from nla.retrain.trainable import chosen_parts
from nla.terms.kernel_term import KernelTerm
from nla.training.loop import Recipe, train

ARCHITECTURE = {
    "model_type": "llama",
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
}
WINDOWS, LENGTH, KEPT = 4, 512, 0.5
PARTS = ["triplets", "norms"]
CASES = ((Linear(), False), (Linear(), True), (Piecewise(r=20, min_h=30), True))  # kernel, whether the budget is adaptive


def model_with(replace: Callable[[nn.Linear], nn.Module]) -> nn.Module:
    """The architecture with every selected linear layer replaced."""
    torch.manual_seed(0)
    module = from_architecture(ARCHITECTURE)
    for spec in select_linears(linear_specs(module), r"\blayers\.", None):
        module.set_submodule(spec.name, replace(module.get_submodule(spec.name)))
    return module


def triplets_for(dense: nn.Linear, kernel: Kernel) -> CompressedLinear:
    m, n = dense.weight.shape
    size = kernel.size(m, n, int(KEPT * m * n))
    return CompressedLinear(KernelTerm(kernel, kernel.random_start(m, n, *size, torch.Generator().manual_seed(0))), None)


def factors_for(dense: nn.Linear) -> nn.Module:
    m, n = dense.weight.shape
    rank, _ = Linear().size(m, n, int(KEPT * m * n))
    return nn.Sequential(nn.Linear(n, rank, bias=False), nn.Linear(rank, m, bias=False))


def plain_step(module: nn.Module, optimiser: torch.optim.Optimizer, tokens: Tensor) -> None:
    """A training step as a user of transformers would write it."""
    module(input_ids=tokens, labels=tokens).loss.backward()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    optimiser.step()
    optimiser.zero_grad()


class Clock(History):
    """A history that also notes the time at which each step ends."""

    def after_step(self, done: int, figures: dict[str, float]) -> None:
        super().after_step(done, figures)
        ended.append(time.perf_counter())


begun: list[float] = []
ended: list[float] = []


def retrain_step(steps: int = 6) -> pd.DataFrame:
    """A row per kernel and budget, see `compare`."""
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(Path(folder))
        return pd.DataFrame([compare(steps, kernel, adaptive, cache) for kernel, adaptive in CASES])


def compare(steps: int, kernel: Kernel, adaptive: bool, cache: Cache) -> dict[str, Any]:
    """Median seconds of a step of each model, and the quartiles of their ratio step by step."""
    begun.clear(), ended.clear()
    plain = model_with(factors_for).train()
    for name, p in plain.named_parameters():
        p.requires_grad_("embed" not in name and "lm_head" not in name)
    optimiser = torch.optim.AdamW([p for p in plain.parameters() if p.requires_grad], lr=1e-5)
    model = LanguageModel(model_with(lambda dense: triplets_for(dense, kernel)).eval(), None)
    trained = chosen_parts(model.module, PARTS)
    by_name = {t.name: t for t in trained}
    terms = kernel_terms(model.module)
    names = list(terms)
    masters = [Triplets(*(by_name[f"{name}.{part}"].master for part in ("A", "B", "mu"))) for name in names]
    kept = sum(term.count() for term in terms.values())
    budget = Adaptive(Cubic(1.5, 0.0, 0.1, 1), 0.85, 0.85, "score", "loss")
    tightening = Tightening(budget, masters, kept * 2 // 3, steps)
    recipe = Recipe(steps, 1e-4, 0, 0.0, 1.0, checkpoint=steps)
    masks = tightening if adaptive else None
    clock = Clock(
        Constraints(terms, by_name), {name: name for name in names}, masks, kept, kept, 0, None, recipe, lambda row: None
    )
    others: list[float] = []

    def batch(step: int) -> list[Sample]:
        tokens = torch.randint(ARCHITECTURE["vocab_size"], (WINDOWS, LENGTH), generator=torch.Generator().manual_seed(step))
        since = time.perf_counter()
        plain_step(plain, optimiser, tokens)
        others.append(time.perf_counter() - since)
        begun.append(time.perf_counter())
        return [Sample(part, part) for part in tokens.split(1)]

    train(trained, model.loss, batch, recipe, cache, f"{kernel.name}{adaptive}", "steps", clock)
    ours = [e - b for b, e in zip(begun[1:], ended[1:], strict=True)]
    low, middle, high = statistics.quantiles([a / b for a, b in zip(ours, others[1:], strict=True)], method="inclusive")
    return {
        "kernel": kernel.name,
        "adaptive": adaptive,
        "retrain_seconds": statistics.median(ours),
        "transformers_seconds": statistics.median(others[1:]),
        "ratio": middle,
        "q25": low,
        "q75": high,
    }


def chosen(arguments: list[str]) -> dict[str, Any]:
    """The arguments of retrain_step() for a command line, and `table`.

    Raises:
        UserError: an argument is unknown or has a wrong value, or there are fewer than 3 steps.
    """
    values = given(arguments, "steps")
    if values.get("steps", 3) < 3:
        raise UserError(f"steps={values['steps']} must be at least 3: the first is not counted")
    return values


if __name__ == "__main__":
    main(retrain_step, chosen, {"retrain_seconds": 2, "transformers_seconds": 2, "ratio": 2, "q25": 2, "q75": 2})
