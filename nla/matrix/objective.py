"""What a fit minimises: ||(W' - W) S||^2, where S is 1 or says which directions of the inputs matter."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nla.matrix.inputs import Statistics
from nla.matrix.spectrum import Spectrum, WeightedSpectrum


@dataclass(frozen=True)
class Factor:
    """S of the norm ||. S||: a diagonal (in,) or a matrix (in, in), fp64; `note` says if it had to be repaired, as a code."""

    S: Tensor
    note: str = ""

    def times(self, matrix: Tensor) -> Tensor:
        """matrix @ S: (rows, in) -> (rows, in)"""
        return matrix * self.S if self.S.ndim == 1 else matrix @ self.S


def whitening(gram: Tensor) -> Factor:
    """L of G = L L^T (Cholesky): ||D L||^2 is the squared error of the outputs, summed over tokens (SVD-LLM).

    A Gram matrix that is not positive definite (fewer tokens than inputs, an input that is always zero) gets
    (-smallest eigenvalue + 1e-6) added to its diagonal, and more only as far as rounding needs it.
    """
    G = gram.double()
    factor, failed = torch.linalg.cholesky_ex(G)
    if not failed:
        return Factor(factor)
    values = torch.linalg.eigvalsh(G)
    shift = float(-values[0].clamp(max=0)) + max(1e-6, 1e-13 * len(G) * float(values[-1]))
    factor = torch.linalg.cholesky(G + shift * torch.eye(len(G), dtype=G.dtype, device=G.device))
    return Factor(factor, f"gram+{shift:.1e}")


class Objective:
    """A weight (out, in), fp32, finite and of unit root mean square, and the norm in which it is to be approximated.

    Args:
        factor: S, or None for the plain Frobenius norm.
    """

    def __init__(self, weight: Tensor, factor: Factor | None = None) -> None:
        self.weight, self.factor = weight, factor

    @property
    def note(self) -> str:
        """What had to be repaired, if anything."""
        return self.factor.note if self.factor else ""

    @cached_property
    def spectrum(self) -> Spectrum:
        """Of W S: its truncations are the best approximations of each rank in this norm."""
        return Spectrum(self.weight) if self.factor is None else WeightedSpectrum(self.weight, self.factor.times)

    @cached_property
    def wide_root(self) -> Tensor | None:
        """S as a matrix (in, in), fp64, scaled so that its rows' squared norms are 1 on average; None for the plain norm."""
        if self.factor is None:
            return None
        S = self.factor.S if self.factor.S.ndim == 2 else torch.diag(self.factor.S)
        return S * (len(S) / S.square().sum()).sqrt()

    @cached_property
    def root(self) -> Tensor | None:
        """The same in fp32."""
        return None if self.wide_root is None else self.wide_root.to(self.weight.dtype)

    @cached_property
    def gram(self) -> Tensor | None:
        """S S^T (in, in), fp32."""
        return None if self.root is None else self.root @ self.root.T

    @cached_property
    def target(self) -> Tensor:
        """W S (out, in), fp32."""
        return self.weight if self.root is None else self.weight @ self.root

    @cached_property
    def energy(self) -> float:
        """||W S||^2"""
        return float(self.target.double().square().sum())

    def weigh(self, right: Tensor) -> Tensor:
        """S^T right, for a right factor (in, k) of the matrix: the right factor of the matrix times S."""
        return right if self.root is None else self.root.T.to(right.dtype) @ right

    def weigh_back(self, d: Tensor) -> Tensor:
        """S d: the gradient for a right factor `right`, given the gradient d for `weigh(right)`."""
        return d if self.root is None else self.root.to(d.dtype) @ d

    def squared(self, error: Tensor) -> tuple[Tensor, Tensor]:
        """||E S||^2 and its gradient for E, some rows of W' - W: (rows, in)"""
        through = error if self.gram is None else error @ self.gram
        return (error * through).sum(), 2 * through


class Norms:
    """The norms in which one weight can be approximated; what is computed in one is shared by all who ask for it."""

    def __init__(self, weight: Tensor, statistics: Statistics) -> None:
        self.weight, self.statistics = weight, statistics

    @cached_property
    def plain(self) -> Objective:
        """||W' - W||"""
        return Objective(self.weight)

    @cached_property
    def outputs(self) -> Objective:
        """||(W' - W) X^T|| over the calibration tokens X; needs the Gram matrix."""
        assert self.statistics.gram is not None
        return Objective(self.weight, whitening(self.statistics.gram))

    def scaled(self, inputs: Tensor, note: str = "") -> Objective:
        """||(W' - W) diag(inputs)||"""
        return Objective(self.weight, Factor(inputs.double(), note))
