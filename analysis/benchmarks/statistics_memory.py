"""`python -m analysis.benchmarks.statistics_memory [SCALE [BLOCKS]]`: peak memory of collecting Gram matrices, in bytes.

The model has BLOCKS blocks of LLaMA-7B's shape with random weights in fp32. SCALE shrinks their width (1: 4096 and 11008).
"""

import json
import sys

import torch

from nla.machine.cache import Cache
from nla.machine.peak_memory import PeakMemory
from nla.models.base import LanguageModel, Sample
from nla.models.causal_lm import from_architecture
from nla.models.select import linear_specs, select_linears
from nla.statistics.blocks import GROUP, chain
from nla.statistics.collect import collect
from nla.statistics.store import StatisticsStore

WINDOW = 512


def measure(scale: float, blocks: int, cache: Cache) -> dict[str, int]:
    """Bytes: the peak without the weights; the Gram matrices and the layer inputs of one block; all Gram matrices."""
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
    with PeakMemory(torch.device("cpu")) as memory:
        collect(model, layers, frozenset({"gram"}), [Sample(t, t) for t in tokens], 0, StatisticsStore(cache, "x"), False)
    gram = 4 * (3 * width**2 + inner**2)
    return {
        "peak_bytes": memory.peak_bytes,
        "gram_bytes": gram,
        "group_bytes": 4 * GROUP * (3 * width + inner),
        "all_gram_bytes": blocks * gram,
        "blocks": len(chain(model, layers)),
    }


if __name__ == "__main__":
    import tempfile
    from pathlib import Path

    scale, blocks = float(sys.argv[1]) if sys.argv[1:] else 1.0, int(sys.argv[2]) if sys.argv[2:] else 1
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps(measure(scale, blocks, Cache(Path(folder)))))
