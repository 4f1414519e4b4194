"""The singular spectrum of one weight matrix, computed once for all ranks."""

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor
from torch.nn.functional import pad


class Spectrum:
    """Singular values and vectors of a weight (out, in), from the fp64 Gram matrix of its shorter side.

    This is cheaper than a bidiagonal SVD: it is one symmetric eigenproblem of the shorter side. Singular values below 1e-7 of
    the largest are lost by squaring and reported as zero. They are far below the error of any truncation.
    """

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    @cached_property
    def weighted(self) -> Tensor:
        """The matrix (out, in) whose spectrum this is, fp64."""
        return self.weight.double()

    @cached_property
    def _eigh(self) -> tuple[Tensor, Tensor]:
        w = self.weighted
        gram = w @ w.T if w.shape[0] <= w.shape[1] else w.T @ w
        values, vectors = torch.linalg.eigh(gram)
        return values.flip(0).clamp_(min=0), vectors.flip(1)

    @property
    def squares(self) -> Tensor:
        """Squared singular values, the largest first, fp64."""
        return self._eigh[0]

    @property
    def energy(self) -> float:
        """The squared Frobenius norm."""
        return float(self.weighted.square().sum())

    def tail(self, rank: int) -> float:
        """Relative squared error of the best approximation of this rank (Eckart and Young, 1936)."""
        values = self._eigh[0]
        total = values.sum()
        return float(values[rank:].sum() / total) if total > 0 else 0.0

    def truncated(self, rank: int) -> tuple[Tensor, Tensor, Tensor]:
        """Truncated SVD: U (out, k), s (k,), V (in, k) in fp64, k = min(rank, out, in). Vectors with s = 0 are zero."""
        w = self.weighted
        values, near = self._eigh
        k = min(rank, len(values))
        s = values[:k].sqrt()
        s = torch.where(s > 1e-7 * s[:1], s, 0.0)  # of eigenvalues in fp64, 2e-8 is noise
        inverse = torch.where(s > 0, 1 / s, 0.0)
        near = near[:, :k]
        left = near * (s > 0) if w.shape[0] <= w.shape[1] else (w @ near) * inverse
        return left, s, self.right(left, inverse)

    def right(self, left: Tensor, inverse: Tensor) -> Tensor:
        """V = W^T U / s (in, k), so that U diag(s) V^T = U U^T W."""
        return (self.weight.double().T @ left) * inverse


class WeightedSpectrum(Spectrum):
    """The singular spectrum of W S. U U^T W is the best approximation of W in the norm ||(W' - W) S||.

    Proof: U U^T (W S) is the truncated SVD of W S (Eckart and Young, 1936), and it equals (U U^T W) S. So S is not inverted,
    and may be singular. `truncated` returns U, the singular values s of W S, and V = W^T U / s.

    Args:
        times: the function matrix -> matrix @ S.
    """

    def __init__(self, weight: Tensor, times: Callable[[Tensor], Tensor]) -> None:
        super().__init__(weight)
        self.times = times

    @cached_property
    def weighted(self) -> Tensor:
        return self.times(self.weight.double())


def balanced_factors(spectrum: Spectrum, rank: int) -> tuple[Tensor, Tensor]:
    """The factors U sqrt(s) (out, rank) and V sqrt(s) (in, rank) in fp64. Columns beyond min(out, in) are zero."""
    left, s, right = spectrum.truncated(rank)
    missing = (0, rank - len(s))
    return pad(left * s.sqrt(), missing), pad(right * s.sqrt(), missing)


def mixed_factors(spectrum: Spectrum, rank: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The balanced factors times a random orthogonal matrix: their product is the same, and their columns are all alike."""
    left, right = balanced_factors(spectrum, rank)
    basis, _ = torch.linalg.qr(torch.randn(rank, rank, generator=generator, dtype=torch.float64))
    basis = basis.to(left.device)
    return left @ basis, right @ basis


def spectrum_flops(out_features: int, in_features: int) -> int:
    """Floating-point operations of a Spectrum: the Gram matrix of the shorter side and its eigenvectors."""
    short, long = sorted((out_features, in_features))
    return 2 * short * short * long + 9 * short**3
