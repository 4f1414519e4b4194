"""Loads a folder of pairs, in which two ordinary linear layers stand in the place of each compressed one."""

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import nn


def put_pairs(model: Any, folder: str | Path) -> Any:
    """Put the layers and numbers of a folder of pairs into a model of its architecture, in place."""
    tensors = load_file(Path(folder) / "pairs.safetensors")
    for name, rank in json.loads((Path(folder) / "pairs.json").read_text()).items():
        dense = model.get_submodule(name)
        like = {"device": dense.weight.device, "dtype": dense.weight.dtype}
        first = nn.Linear(dense.in_features, rank, bias=False, **like)
        second = nn.Linear(rank, dense.out_features, bias=dense.bias is not None, **like)
        model.set_submodule(name, nn.Sequential(first, second))
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    tied = getattr(model, "all_tied_weights_keys", {})  # each pair of tied weights is stored once
    lacking = set(missing) - {*tied, *tied.values()}
    if lacking or unexpected:
        raise ValueError(f"{folder} does not fit the model: it lacks {sorted(lacking)} and has {unexpected} too much")
    return model.eval()
