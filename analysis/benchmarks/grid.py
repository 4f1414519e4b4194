"""How much SmolLM2's origin flatters 4-bit quantisation: python -m analysis.benchmarks.grid

The packaged model was dequantised from Q4_1: in every row, groups of 32 weights take 16 equidistant values. Rounding to the
same groups and widths therefore changes next to nothing. The same rounding after a random rotation of the inputs, which a
model without this origin would not feel, shows what 4 bits cost otherwise.
"""

from pathlib import Path

import torch
from hydra.utils import instantiate
from torch import Tensor

from analysis.composed import composed
from nla.machine.cache import Cache

GROUP, LEVELS = 32, 15  # weights that share a minimum and a step; steps between the smallest and the largest value of 4 bits


def rounded(weight: Tensor) -> Tensor:
    """The weight (out, in) rounded to the nearest of 16 values between the smallest and the largest of each group of a row."""
    groups = weight.unflatten(1, (-1, GROUP))
    low, high = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = ((high - low) / LEVELS).clamp_min(torch.finfo(weight.dtype).tiny)
    return (((groups - low) / step).round() * step + low).flatten(1)


def error(weight: Tensor) -> float:
    """Relative squared error of the rounding."""
    return float((rounded(weight) - weight).square().sum() / weight.square().sum())


def main() -> None:
    config = composed("model=smollm2_135m")
    model = instantiate(config["model"], _convert_="all").load("cpu", "float32", Cache(Path(config["cache_dir"])))
    layers = [m.weight.detach() for name, m in model.module.named_modules() if "layers." in name and hasattr(m, "in_features")]
    generator = torch.Generator().manual_seed(0)
    turns = {n: torch.linalg.qr(torch.randn(n, n, generator=generator))[0] for n in {w.shape[1] for w in layers}}
    plain = [error(w) for w in layers]
    rotated = [error(w @ turns[w.shape[1]]) for w in layers]
    print(f"{len(layers)} matrices, 4 bits, groups of {GROUP}: mean relative error")
    print(f"as packaged             {sum(plain) / len(plain):.1e}")
    print(f"after a random rotation {sum(rotated) / len(rotated):.1e}")


if __name__ == "__main__":
    main()
