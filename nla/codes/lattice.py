"""Codebooks of vectors of eight numbers, whose entries are points of the lattice E8, the densest packing in eight dimensions.

Source: Tseng et al., "QuIP#", ICML 2024, section 4. `E8P` has 2^16 entries, two bits a number; `E8Shell` has 2^8, one bit.
"""

from abc import ABC, abstractmethod
from functools import cache
from itertools import product

import torch
from torch import Tensor

# Tables are made on the CPU in fp32, although transformers may import this while it builds a bf16 model on the meta device.
CPU, FP32 = torch.device("cpu"), torch.float32
SHIFT = 0.25  # added to, or subtracted from, all eight numbers of an entry of E8P


class LatticeCodebook(ABC):
    """A list of vectors of eight numbers. A code is a place in the list.

    Attributes:
        width: bits of a number; a code takes 8 width bits.
        entries: all vectors (2^(8 width), 8), fp32, on the CPU.
    """

    width: int
    entries: Tensor

    @abstractmethod
    def nearest(self, x: Tensor) -> Tensor:
        """The codes of the entries nearest to vectors (k, 8): int64 (k,)"""


class E8Shell(LatticeCodebook):
    """The 240 shortest vectors of E8, of squared norm 2, and the 16 vectors +-2 e_i, of squared norm 4.

    The authors' list has zero and 15 vectors of norm 4. Its mean squared error for Gaussian numbers, 0.318, is 0.4 % smaller.
    """

    width = 1

    def __init__(self) -> None:
        whole = [v for v in product((-1.0, 0.0, 1.0), repeat=8) if sum(map(abs, v)) == 2]
        half = [v for v in product((-0.5, 0.5), repeat=8) if sum(v) % 2 == 0]
        with CPU:
            twice = 2 * torch.eye(8, dtype=FP32)
            self.entries = torch.cat((torch.tensor(whole, dtype=FP32), torch.tensor(half, dtype=FP32), twice, -twice))

    def nearest(self, x: Tensor) -> Tensor:
        entries = on_device(self, x.device).to(x.dtype)
        return (entries.square().sum(1) - 2 * x @ entries.T).argmin(1)


class E8P(LatticeCodebook):
    """Vectors s * p +- 1/4: p are 256 patterns of sizes, s are eight signs.

    Patterns consist of 1/2, 3/2 and 5/2: all 227 of squared norm 10 at most, and 29 of squared norm 12. These are the first
    in lexicographic order with five 3/2 and three 1/2. The signs make the sum of s * p even, so that seven are free, and s * p
    is a point of D8 + 1/2. With the shift, it is a point of D8 + 3/4 or of D8 + 1/4, which together are E8 + 1/4.

    A code has the pattern in its upper 8 bits, the first seven signs in the next, the first lowest, and the shift in bit 0.

    Attributes:
        patterns: the sizes p (256, 8), fp32, by rising norm, then in lexicographic order.
        falling: the seven patterns of norm 10 at most that fall from left to right (7, 8). The other 220 are orders of these.
        long: the patterns of norm 12 (29, 8).
        places: the place in `patterns` of the pattern with the number sum_i (p_i - 1/2) 3^i: int64 (3^8,)
    """

    width = 2

    def __init__(self) -> None:
        with CPU:
            self.patterns = sizes_of_e8p()
            shorter, self.long = self.patterns.split((227, 29))
            self.falling = shorter[(shorter.diff(dim=1) <= 0).all(1)]
            self.places = torch.zeros(3**8, dtype=torch.int64)
            self.places[number_of(self.patterns)] = torch.arange(256)
            codes = torch.arange(2**16)
            sizes = self.patterns[codes >> 8]
            negative = (codes[:, None] >> torch.arange(1, 8)) & 1  # (2^16, 7)
            last = (negative.sum(1) + sizes.sum(1).long()) % 2
            signs = 1 - 2 * torch.cat((negative, last[:, None]), 1)
            self.entries = sizes * signs + SHIFT * (1 - 2 * (codes[:, None] & 1))

    def nearest(self, x: Tensor) -> Tensor:
        """The exact search. Let z = x -+ 1/4 be the vectors without the shift.

        The best signs of a pattern are those of z. If these make the sum odd, the sign with the smallest |z_i| p_i is
        flipped. The patterns of norm 10 at most are all orders of seven patterns. Of all orders, the best has the larger
        sizes where |z| is larger: if a sign is flipped, that is of the smallest |z_i|, and its size is 1/2.
        """
        z = torch.stack((x - SHIFT, x + SHIFT))  # (2, k, 8)
        ordered, order = z.abs().sort(-1, descending=True)
        odd = (z < 0).sum(-1, keepdim=True) % 2
        kinds = self.falling.to(x)
        flipped = (odd + kinds.sum(1)) % 2  # (2, k, 7)
        distances = kinds.square().sum(1) - 2 * (ordered @ kinds.T - flipped * ordered[..., 7:])
        distance, kind = distances.min(-1)
        sizes = torch.empty_like(z).scatter_(-1, order, kinds[kind])
        self.compare_long_ones(z, ordered, odd, distance, sizes)
        shift = (z.square().sum(-1) + distance).argmin(0)  # (k,)
        rows = torch.arange(len(x), device=x.device)
        return self.code_of(z[shift, rows], sizes[shift, rows], shift)

    def compare_long_ones(self, z: Tensor, ordered: Tensor, odd: Tensor, distance: Tensor, sizes: Tensor) -> None:
        """Replace distances and sizes, in place, where a pattern of norm 12 is nearer.

        Args:
            z, ordered, odd: the vectors (2, k, 8), their sorted sizes, and whether their signs are odd in number (2, k, 1).
            distance: |z - s p|^2 - |z|^2 (2, k), of the sizes p (2, k, 8).
        """
        long = self.long.to(z)
        least = 12 - 2 * (ordered @ long[0].sort(descending=True).values)  # of all orders, without a flipped sign
        some = least < distance
        near = z[some].abs()  # (vectors, 8)
        flipped = (odd[some] + long.sum(1)) % 2  # (vectors, 29)
        change = 2 * (near[:, None] * long).amin(-1)
        found, which = (12 - 2 * (near @ long.T - flipped * change)).min(-1)
        better = found < distance[some]
        distance[some] = torch.where(better, found, distance[some])
        sizes[some] = torch.where(better[:, None], long[which], sizes[some])

    def code_of(self, z: Tensor, sizes: Tensor, shift: Tensor) -> Tensor:
        """Codes (k,) of the patterns `sizes` (k, 8) with the signs nearest to z (k, 8); shift is 0 for +1/4, 1 for -1/4."""
        negative = z < 0
        wrong = (negative.sum(1) + sizes.sum(1)) % 2 != 0
        flip = (z.abs() * sizes).argmin(1)
        negative[torch.arange(len(z), device=z.device), flip] ^= wrong
        pattern = self.places.to(z.device)[number_of(sizes)]
        signs = (negative[:, :7].long() << torch.arange(1, 8, device=z.device)).sum(1)
        return pattern << 8 | signs | shift


def sizes_of_e8p() -> Tensor:
    """The patterns of sizes of E8P (256, 8)."""
    found: dict[int, list[tuple[float, ...]]] = {norm: [] for norm in (2, 4, 6, 8, 10, 12)}
    for p in product((0.5, 1.5, 2.5), repeat=8):
        norm = sum(size * size for size in p)
        if norm <= 10 or (norm == 12 and max(p) == 1.5 and len(found[12]) < 29):
            found[int(norm)].append(p)
    return torch.tensor([p for same in found.values() for p in same], dtype=FP32)


def number_of(sizes: Tensor) -> Tensor:
    """sum_i (p_i - 1/2) 3^i of each pattern of sizes p: (k, 8) -> int64 (k,)"""
    return ((sizes - 0.5).long() * 3 ** torch.arange(8, device=sizes.device)).sum(1)


@cache
def on_device(codebook: LatticeCodebook, device: torch.device) -> Tensor:
    """The entries of a codebook on this device. They are copied to a GPU once."""
    return codebook.entries.to(device)
