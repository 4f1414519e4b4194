"""`python -m analysis.benchmarks.statistics_memory [scale=1] [blocks=1] [table=FILE.csv]`: peak memory of Gram matrices.

The model has `blocks` blocks of LLaMA-7B's shape with random weights in fp32. `scale` shrinks their width (1: 4096 and 11008).
"""

import tempfile
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from analysis.benchmarks.command import given, main
from nla.machine.cache import Cache
from nla.machine.peak_memory import PeakMemory
from nla.models.base import LanguageModel, Sample
from nla.models.causal_lm import from_architecture
from nla.models.select import linear_specs, select_linears
from nla.statistics.blocks import GROUP, chain
from nla.statistics.collect import collect, stripes
from nla.statistics.store import StatisticsStore

WINDOW = 512


def statistics_memory(scale: float = 1.0, blocks: int = 1) -> pd.DataFrame:
    """One row of bytes: the peak without the weights; the Gram matrices and the layer inputs of one block; 32 blocks' matrices.

    All but the peak are counted. `gram_flops` are the operations of one block's Gram matrices relative to the whole products.
    """
    width, inner = int(4096 * scale), int(11008 * scale)
    architecture = {
        "model_type": "llama",
        "vocab_size": 256,
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": blocks,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
    }
    torch.manual_seed(0)
    model = LanguageModel(from_architecture(architecture).eval(), None)
    layers = [spec.name for spec in select_linears(linear_specs(model.module), r"\blayers\.", None)]
    tokens = torch.randint(256, (GROUP // WINDOW, 1, WINDOW))
    with tempfile.TemporaryDirectory() as folder, PeakMemory(torch.device("cpu")) as memory:
        store = StatisticsStore(Cache(Path(folder)), "x")
        collect(model, layers, frozenset({"gram"}), [Sample(t, t) for t in tokens], 0, store, False)
    sizes = (width, width, width, inner)  # inputs of the block's layers: of q, k and v; of o; of gate and up; of down
    entries = sum(size**2 for size in sizes)
    figures = {
        "blocks": len(chain(model, layers)),
        "peak_bytes": memory.peak_bytes,
        "gram_bytes": 4 * entries,
        "group_bytes": 4 * GROUP * sum(sizes),
        "gram_32_blocks_bytes": 32 * 4 * entries,
        "gram_flops": sum(added(size) for size in sizes) / entries,
    }
    return pd.DataFrame([figures])


def added(size: int) -> int:
    """Entries of a Gram matrix (size, size) that are added up."""
    return sum((stripe.stop - stripe.start) * (size - stripe.start) for stripe in stripes(size))


def chosen(arguments: list[str]) -> dict[str, Any]:
    """The arguments of statistics_memory() for a command line, and `table`."""
    return given(arguments, "scale", "blocks")


if __name__ == "__main__":
    main(statistics_memory, chosen, {"gram_flops": 2})
