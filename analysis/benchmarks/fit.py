"""`python -m analysis.benchmarks.fit [ratio=0.5] [m=4096 n=4096] [steps=200] [table=FILE.csv]`: seconds to fit one matrix.

The hybrid's fit beside SVD-LLM's, in fp32, with all threads. Weight and inputs are random, because the seconds of a step do not
depend on their values. Each fit is timed once, since one of the hybrid takes minutes.
"""

from copy import deepcopy
from typing import Any

import pandas as pd
import torch

from analysis.benchmarks.command import given, main
from analysis.composed import composed
from nla.harness.request import build, resolve
from nla.matrix.inputs import Statistics

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fit(m: int = 4096, n: int = 4096, ratio: float = 0.5, steps: int = 200) -> pd.DataFrame:
    """A row per method for a weight (m, n): steps, seconds, and counted operations of the fit.

    Args:
        steps: of the hybrid's gradient descent.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(m, n, generator=generator).to(DEVICE)
    inputs = torch.randn(2 * n, n, generator=generator).to(DEVICE)
    statistics = Statistics(gram=inputs.T @ inputs)
    bits = int((1 - ratio) * weight.numel()) * 32
    rows = []
    for settings in (["method=svd_llm"], ["method=hybrid", f"solver.steps={steps}"]):
        method = build("method", resolve(deepcopy(composed(*settings)))["method"])
        (found,) = method.compress([weight], bits, [statistics], generator)
        rows.append(
            {
                "method": settings[0].partition("=")[2],
                "steps": found.steps,
                "seconds": found.seconds,
                "tflop": found.flops / 1e12,
            }
        )
    return pd.DataFrame(rows)


def chosen(arguments: list[str]) -> dict[str, Any]:
    """The arguments of fit() for a command line, and `table`."""
    return given(arguments, "ratio", "m", "n", "steps")


if __name__ == "__main__":
    main(fit, chosen, {"seconds": 1, "tflop": 2}, DEVICE.type)
