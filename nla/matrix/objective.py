"""The error that a fit minimises, ||(W' - W) S||^2. S is the identity, or weights the directions of the inputs."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from nla.matrix.inputs import Statistics
from nla.matrix.spectrum import Spectrum, WeightedSpectrum

DAMPING = 0.01  # as in GPTQ


@dataclass(frozen=True)
class Factor:
    """S of the norm ||(W' - W) S||: a diagonal (in,) or a matrix (in, in), fp64. `note` is the code of a repair, or empty."""

    S: Tensor
    note: str = ""

    def times(self, matrix: Tensor) -> Tensor:
        """The product matrix @ S: (rows, in) -> (rows, in)"""
        return matrix * self.S if self.S.ndim == 1 else matrix @ self.S

    @cached_property
    def gram(self) -> Tensor:
        """S S^T (in, in), fp64, scaled so that the mean of its diagonal is 1."""
        S = self.S if self.S.ndim == 2 else torch.diag(self.S)
        return S @ S.T * (len(S) / S.square().sum())


def whitening(gram: Tensor) -> Factor:
    """The Cholesky factor L of a Gram matrix G = L L^T, (in, in) (SVD-LLM).

    ||(W' - W) L||^2 is the squared error of the layer's outputs, summed over tokens.

    A G that is not positive definite (fewer tokens than inputs, an input that is always zero) gets (-smallest eigenvalue +
    1e-6) added to its diagonal, or slightly more if rounding requires it.
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
    """A weight W (out, in), and the norm ||(W' - W) S|| in which it is approximated.

    Args:
        weight: fp32, finite; of a fit, with a root mean square of 1.
        factor: S, or None for the plain Frobenius norm.
    """

    def __init__(self, weight: Tensor, factor: Factor | None = None) -> None:
        self.weight, self.factor = weight, factor

    @property
    def note(self) -> str:
        """The code of a repair of S, or an empty string."""
        return self.factor.note if self.factor else ""

    @cached_property
    def spectrum(self) -> Spectrum:
        """The singular spectrum of W S. Its truncations give the best approximation of W of each rank in this norm."""
        return Spectrum(self.weight) if self.factor is None else WeightedSpectrum(self.weight, self.factor.times)

    @cached_property
    def wide_root(self) -> Tensor | None:
        """S as a matrix (in, in), fp64, scaled so that the mean squared norm of its rows is 1; None for the plain norm."""
        if self.factor is None:
            return None
        S = self.factor.S if self.factor.S.ndim == 2 else torch.diag(self.factor.S)
        return S * (len(S) / S.square().sum()).sqrt()

    @cached_property
    def root(self) -> Tensor | None:
        """`wide_root` in fp32."""
        return None if self.wide_root is None else self.wide_root.to(self.weight.dtype)

    @cached_property
    def roots(self) -> dict[torch.dtype, Tensor]:
        """`root` in the types in which it was asked for by `root_as`."""
        return {}

    def root_as(self, dtype: torch.dtype) -> Tensor | None:
        """`root` in a type. It is kept, because a fit multiplies with it in each step, and conversion takes a tenth as long."""
        if self.root is None:
            return None
        if dtype not in self.roots:
            self.roots[dtype] = self.root.to(dtype)
        return self.roots[dtype]

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

    def damped(self, share: float) -> "Objective":
        """The norm with `share` of the mean of the diagonal of S S^T added to its diagonal, as GPTQ does.

        Without it, codes of few bits buy a little less error with huge errors in directions that the inputs hardly have.
        """
        if self.factor is None:
            return self
        gram = self.factor.gram
        return Objective(self.weight, whitening(gram + share * torch.eye(len(gram)).to(gram)))

    def weigh(self, right: Tensor) -> Tensor:
        """S^T R (in, k) for a right factor R (in, k) of a matrix: the right factor of the matrix times S."""
        root = self.root_as(right.dtype)
        return right if root is None else root.T @ right

    def weigh_back(self, d: Tensor) -> Tensor:
        """S d (in, k): the gradient with respect to a right factor, given d, that with respect to weigh(right factor)."""
        root = self.root_as(d.dtype)
        return d if root is None else root @ d

    def preconditioned(self, damping: float, dtype: torch.dtype = torch.float32) -> Tensor | None:
        """(G + damping I)^-1 S (in, in), in a type, where G = S S^T has a mean diagonal of 1; None for the plain norm.

        In place of S in `weigh_back`, it turns the gradient with respect to a right factor into a damped Newton step for fixed
        left factors, up to their Gram matrix. A few large directions of the inputs no longer decide the step of all columns.
        """
        if self.wide_root is None:
            return None
        S = self.wide_root
        found: Tensor = torch.linalg.solve(S @ S.T + damping * torch.eye(len(S)).to(S), S).to(dtype)
        return found

    def squared(self, error: Tensor) -> tuple[Tensor, Tensor]:
        """||E S||^2 and its gradient (rows, in) with respect to E, where E (rows, in) are rows of W' - W."""
        through = error if self.gram is None else error @ self.gram
        return (error * through).sum(), 2 * through


class Norms:
    """The norms in which one weight (out, in) can be approximated. `plain` and `outputs` are computed once.

    Args:
        correction: see `outputs`.
    """

    def __init__(self, weight: Tensor, statistics: Statistics, correction: float = 0.0) -> None:
        self.weight, self.statistics, self.correction = weight, statistics, correction

    @cached_property
    def plain(self) -> Objective:
        """||W' - W||"""
        return Objective(self.weight)

    @cached_property
    def outputs(self) -> Objective:
        """||(W' - T) X^T|| over the calibration tokens X; needs the Gram matrix G = X^T X.

        T is the weight W, unless X are inputs behind compressed blocks whose errors are to be corrected. Then T is between W
        (correction 0) and the matrix (1) whose outputs T X^T are closest to the outputs W Z^T of the dense model:
        T = W + correction * W (Z^T X - G) (G + d)^-1. SAES-SVD has such a T, AA-SVD with correction 1. The damping d, a share
        DAMPING of the mean of G's diagonal, leaves W where the tokens say little.
        """
        gram = self.statistics.gram
        assert gram is not None
        if self.statistics.cross is None:
            return Objective(self.weight, whitening(gram))
        G, W = gram.double(), self.weight.double()
        damping = DAMPING * float(G.diagonal().mean()) or 1.0  # 1 if all inputs are zero
        damped = torch.linalg.cholesky(G + damping * torch.eye(len(G)).to(G))
        missing = W @ (self.statistics.cross.double() - G)
        target = W + self.correction * torch.cholesky_solve(missing.T, damped).T
        return Objective(target.to(self.weight.dtype), whitening(gram))

    def scaled(self, inputs: Tensor, note: str = "") -> Objective:
        """||(W' - W) diag(inputs)||, where `inputs` (in,) are weights of the inputs."""
        return Objective(self.weight, Factor(inputs.double(), note))
