"""The damping of a Hessian, and its triangular factor, which rounding with error feedback reads."""

import torch
from torch import Tensor

DAMPING = 0.01  # fraction of the mean of the diagonal that is added to it, as in the authors' codes of GPTQ and QuIP#


def damped(hessian: Tensor) -> Tensor:
    """H + damping (n, n), fp64. Without it, rounding accepts huge errors in directions that the inputs hardly ever have."""
    return hessian + DAMPING * hessian.diagonal().mean() * torch.eye(len(hessian)).to(hessian)


def upper_factor(hessian: Tensor) -> Tensor:
    """R (n, n), fp64, upper triangular, with R R^T = H: a Cholesky factor with rows and columns in reverse."""
    return torch.linalg.cholesky(hessian.flip(0, 1)).flip(0, 1)
