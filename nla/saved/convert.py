"""Converts a compressed model: to dense layers, to pairs of linear layers, or to pivot rows. The matrices stay the same."""

import inspect
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_model
from torch import Tensor, nn

from nla.compressed.contents import compressed_layers
from nla.compressed.surgery import merge
from nla.machine.errors import UserError
from nla.saved import pairs
from nla.saved.save import SHARD
from nla.terms.pivoted import pivoted

LARGEST_ERROR = 4.0  # relative error that pivot rows may have, as a multiple of the precision of the numbers' type

PAIRS = """Each compressed layer is two ordinary linear layers. `pairs.json` has their ranks, `pairs.safetensors` all numbers.
This function puts them into a model of the architecture. It needs torch and safetensors, but not the project that wrote the
folder.

```python
{imports}

{source}

{build}
put_pairs(model, FOLDER)
```"""
BUILD = {
    True: "from transformers import AutoConfig, AutoModelForCausalLM\n\n"
    "model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FOLDER))",
    False: 'import timm\nimport torch\n\nmodel = timm.create_model(f"local-dir:{FOLDER}").to(DTYPE)',
}


@torch.no_grad()
def pivot(model: nn.Module) -> Iterator[str]:
    """Replace terms by pivot rows, in place, where these have fewer bits and are precise enough. Yields a line per layer."""
    for name, layer in compressed_layers(model).items():
        factors, before = layer.term.wide_factors(), layer.term.bits()
        if factors is None:
            yield f"{name}: kept, because {layer.term.describe()} has no thin factors"
            continue
        if not before:
            yield f"{name}: kept, because the matrix is zero"
            continue
        dtype = next(layer.term.parameters()).dtype
        term = pivoted(*factors)
        stored, matrix = term.as_stored(dtype), factors[0] @ factors[1].T
        error = float((stored.as_stored(torch.float64).dense() - matrix).norm() / matrix.norm().clamp(min=1e-300))
        most = LARGEST_ERROR * torch.finfo(dtype).eps
        if stored.bits() >= before:
            yield f"{name}: kept, because pivot rows would take {stored.bits() / before:.2f} times its bits"
        elif not error <= most:
            large = float(term.coefficients.abs().max())
            yield (
                f"{name}: kept, because pivot rows with coefficients up to {large:.3g} "
                f"would have a relative error of {error:.1e} in {dtype}, above {most:.1e}"
            )
        else:
            layer.term = stored
            yield f"{name}: {stored.bits() / before:.3f} of its bits, relative error {error:.1e}"


def write_dense(model: Any, folder: Path) -> str:
    """Write the model with dense layers as its own library does. Returns how to load it, for the model card."""
    merge(model)
    if hasattr(model, "save_pretrained"):
        model.hf_quantizer.remove_quantization_config(model)
        model.save_pretrained(folder, max_shard_size=SHARD)
        return "`AutoModelForCausalLM.from_pretrained(FOLDER)`, as any model of transformers."
    from timm.models._hub import save_for_hf

    save_for_hf(model, str(folder), safe_serialization=True)
    return '`timm.create_model(f"local-dir:{FOLDER}", pretrained=True)`, as any model of timm.'


def write_pairs(model: Any, folder: Path, multiple: int) -> str:
    """Write each compressed layer as two linear layers of the library's own. Returns how to load it, for the model card.

    Args:
        multiple: ranks are padded with zeros to a multiple of this.

    Raises:
        UserError: a layer's kernel has no thin factors.
    """
    ranks = {}
    for name, layer in compressed_layers(model).items():
        factors = layer.term.wide_factors()
        if factors is None:
            raise UserError(
                f"{name} ({layer.term.describe()}) has no thin factors, so it is no pair of linear layers; use --to dense"
            )
        dtype = next(layer.term.parameters()).dtype
        left, right = (nn.functional.pad(f, (0, -f.shape[1] % multiple)).to(dtype) for f in factors)
        ranks[name] = left.shape[1]
        model.set_submodule(name, pair(left, right, layer.bias))
    text_model = hasattr(model, "save_pretrained")
    if text_model:
        model.hf_quantizer.remove_quantization_config(model)
        model.config.save_pretrained(folder)
    else:
        from timm.models._hub import save_config_for_hf

        save_config_for_hf(model, str(folder / "config.json"))
    (folder / "pairs.json").write_text(json.dumps(ranks, indent=1))
    save_model(model, str(folder / "pairs.safetensors"))  # a tensor with several names is written once
    source = inspect.getsource(pairs.put_pairs)
    imports = inspect.getsource(pairs).partition('"""\n\n')[2].partition("\n\n\n")[0]
    build = BUILD[text_model].replace("DTYPE", str(next(model.parameters()).dtype))
    return PAIRS.format(source=source, imports=imports, build=build)


def pair(left: Tensor, right: Tensor, bias: Tensor | None) -> nn.Sequential:
    """Two linear layers with the matrix left @ right.T: (out, k), (in, k)."""
    (out_features, k), in_features = left.shape, len(right)
    first = nn.Linear(in_features, k, bias=False, device="meta")
    layers = nn.Sequential(first, nn.Linear(k, out_features, bias=bias is not None, device="meta"))
    state = {"0.weight": right.T.contiguous(), "1.weight": left.contiguous()}
    if bias is not None:
        state["1.bias"] = bias.detach()
    layers.load_state_dict(state, assign=True)
    return layers
