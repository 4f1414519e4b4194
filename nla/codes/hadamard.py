"""Rotation by a random Hadamard transform: an orthogonal matrix that spreads every outlier over all numbers of a vector.

V = (H kron C) diag(signs), (n, n) with n = 2^k m and m odd. H is the Hadamard matrix of size 2^k, with entries +-2^(-k/2). No
Hadamard matrix has an odd size above 1, so C is the orthonormal DCT-II of size m, with entries of at most sqrt(2 / m). One
product takes O(n k + n m) operations. Source: Tseng et al., "QuIP#", ICML 2024, which has other matrices for odd factors.
"""

import math

import torch
from torch import Tensor


def rotated(x: Tensor, signs: Tensor) -> Tensor:
    """x V^T: the product of V and each vector of the last axis (..., n), in the type of x.

    Args:
        signs: of `random_signs`, (n,).
    """
    m = odd_factor(x.shape[-1])
    parts = (x * signs.to(x)).unflatten(-1, (-1, m))  # (..., 2^k, m)
    return walsh_hadamard((parts @ cosines(m).to(x).T).flatten(-2), m)


def rotated_back(x: Tensor, signs: Tensor) -> Tensor:
    """x V: the inverse of rotated(), (..., n) -> (..., n)."""
    m = odd_factor(x.shape[-1])
    parts = walsh_hadamard(x, m).unflatten(-1, (-1, m))
    return (parts @ cosines(m).to(x)).flatten(-2) * signs.to(x)


def random_signs(seed: int, *sizes: int) -> list[Tensor]:
    """Signs +-1 for vectors of these sizes, fp32 on the CPU. A seed gives the same signs on every machine."""
    bits = torch.randint(0, 2, (sum(sizes),), generator=torch.Generator().manual_seed(seed))
    return list((2.0 * bits - 1).split(sizes))


def walsh_hadamard(x: Tensor, m: int) -> Tensor:
    """(H kron I) x for each vector (..., 2^k m), where I is the identity of size m. H is symmetric and its own inverse."""
    n, width = x.shape[-1], m
    while width < n:
        first, second = x.unflatten(-1, (-1, 2, width)).unbind(-2)
        x = torch.stack((first + second, first - second), -2).flatten(-3)
        width *= 2
    return x * math.sqrt(m / n)


def cosines(m: int) -> Tensor:
    """The orthonormal DCT-II (m, m), fp64: C[i, j] = sqrt(2 / m) cos(pi i (2 j + 1) / (2 m)), and 1 / sqrt(m) in row 0."""
    i, j = torch.arange(m, dtype=torch.float64)[:, None], torch.arange(m, dtype=torch.float64)
    C = math.sqrt(2 / m) * torch.cos(math.pi * i * (2 * j + 1) / (2 * m))
    C[0] = 1 / math.sqrt(m)
    return C


def odd_factor(n: int) -> int:
    """The largest odd number that divides n >= 1."""
    return n // (n & -n)


def rotation_flops(n: int) -> int:
    """Floating-point operations of the rotation of one vector."""
    m = odd_factor(n)
    return 2 * n + 2 * n * m + n * (n // m).bit_length()
