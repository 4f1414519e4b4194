"""The triangular factor that rounding with error feedback takes of a Hessian."""

import torch
from torch import Tensor

DAMPING = 0.01  # fraction of the mean of the diagonal that is added to it, as in the authors' codes of GPTQ and QuIP#


def damped_factor(hessian: Tensor) -> Tensor:
    """R (n, n), fp64, upper triangular, with R R^T = H + damping: a Cholesky factor with rows and columns in reverse."""
    n = len(hessian)
    damped = hessian + DAMPING * hessian.diagonal().mean() * torch.eye(n, dtype=hessian.dtype, device=hessian.device)
    return torch.linalg.cholesky(damped.flip(0, 1)).flip(0, 1)
