"""Random matrices and inputs, the same every time, and the fit of one matrix."""

import torch

from nla.matrix.inputs import Statistics
from nla.methods.base import Method
from nla.methods.fit import Fit


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def correlated(n: int, tokens: int = 0) -> Statistics:
    """The Gram matrix (n, n) of correlated inputs of different sizes: `tokens` of them, or 4 n."""
    tokens = tokens or 4 * n
    x = normal(tokens, n, seed=1) * torch.linspace(0.1, 2, n) + 2 * normal(tokens, 1, seed=2)
    return Statistics(gram=x.T @ x)


def compress(method: Method, weight: torch.Tensor, per_weight: float, statistics: Statistics | None = None) -> Fit:
    """The fit of one matrix in so many bits per weight."""
    statistics = statistics or correlated(weight.shape[1])
    (fit,) = method.compress([weight], int(per_weight * weight.numel()), [statistics], torch.Generator().manual_seed(0))
    return fit
