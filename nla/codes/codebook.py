"""Codebooks: the values that the stored numbers of A and B may have, each named by a code of a few bits."""

import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from nla.kernels.base import Kernel
from nla.kernels.phase import Phase
from nla.machine.errors import UserError, require_choice, require_integer
from nla.matrix.triplets import Triplets

# Distance of 2^width levels that has the least squared error for a normal distribution of variance 1 (Max, 1960).
STEPS = {1: 1.596, 2: 0.996, 3: 0.586, 4: 0.335, 5: 0.188, 6: 0.104, 7: 0.057, 8: 0.031}


class Codebook(ABC):
    """2^width values on a line or a circle.

    Args:
        width: bits of a code, 1 to 8.
    """

    def __init__(self, width: int) -> None:
        require_integer("storage.width", width, 1)
        require_choice("storage.width", width, list(range(1, 9)))
        self.width = width

    @property
    @abstractmethod
    def name(self) -> str:
        """The name in tables, such as `angle4`."""

    @abstractmethod
    def nearest(self, numbers: Tensor) -> Tensor:
        """The codes, int64, of the nearest values."""

    @abstractmethod
    def values(self, codes: Tensor) -> Tensor:
        """The values of integer codes, fp32."""

    @abstractmethod
    def scaled(self, kernel: Kernel, triplets: Triplets) -> Triplets:
        """Triplets of the same matrix whose A and B have a size that suits the values.

        Raises:
            UserError: the numbers of this kernel cannot be stored so.
        """

    @abstractmethod
    def snapped(self, numbers: Tensor) -> Tensor:
        """The nearest values, or values that count the same for the kernel; faster than by their codes."""

    def rounded(self, numbers: Tensor) -> Tensor:
        """`snapped`, with a gradient as if nothing were rounded ("straight-through", Bengio et al., 2013)."""
        rounded: Tensor = StraightThrough.apply(numbers, self)  # type: ignore[no-untyped-call]
        return rounded


class StraightThrough(torch.autograd.Function):
    """Rounding to a codebook; the gradient with respect to the rounded numbers becomes that of the numbers."""

    @staticmethod
    def forward(context: Any, numbers: Tensor, codebook: Codebook) -> Tensor:
        return codebook.snapped(numbers)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return gradient, None


class Angles(Codebook):
    """2^width angles at equal distances on the circle. It needs no scales. For the phase kernel."""

    @property
    def name(self) -> str:
        return f"angle{self.width}"

    @property
    def step(self) -> float:
        return 2 * math.pi / 2**self.width

    def nearest(self, numbers: Tensor) -> Tensor:
        return (numbers.float() / self.step).round().long() % 2**self.width

    def values(self, codes: Tensor) -> Tensor:
        return codes * self.step

    def snapped(self, numbers: Tensor) -> Tensor:
        return (numbers.float() / self.step).round_().mul_(self.step).to(numbers.dtype)

    def scaled(self, kernel: Kernel, triplets: Triplets) -> Triplets:
        if not isinstance(kernel, Phase):
            raise UserError(f"storage={self.name} holds one angle a number, unlike kernel={kernel.name}; use kernel=phase")
        return triplets


class EvenLevels(Codebook):
    """2^width levels at distances of 1 around zero: for two bits -1.5, -0.5, 0.5, 1.5. mu gives each triplet its scale."""

    @property
    def name(self) -> str:
        return f"int{self.width}"

    def nearest(self, numbers: Tensor) -> Tensor:
        return (numbers.float() + (2**self.width - 1) / 2).round().clamp(0, 2**self.width - 1).long()

    def values(self, codes: Tensor) -> Tensor:
        return codes - (2**self.width - 1) / 2

    def snapped(self, numbers: Tensor) -> Tensor:
        most = (2**self.width - 1) / 2
        return (numbers.float() + most).round_().clamp_(0, 2 * most).sub_(most).to(numbers.dtype)

    def scaled(self, kernel: Kernel, triplets: Triplets) -> Triplets:
        found = kernel.with_size(triplets, 1 / STEPS[self.width])
        if found is None:
            raise UserError(
                f"storage={self.name} needs triplets that can be scaled, which those of kernel={kernel.name} cannot; "
                "use kernel=linear or kernel=piecewise, or storage=float"
            )
        return found


CODEBOOKS = {"angle": Angles, "int": EvenLevels}


def codebook_of(kind: str, width: int) -> Codebook:
    """The codebook of this kind, a key of CODEBOOKS."""
    require_choice("storage.kind", kind, list(CODEBOOKS))
    return CODEBOOKS[kind](width)


def kind_of(codebook: Codebook) -> str:
    """The key of CODEBOOKS of a codebook."""
    return next(kind for kind, known in CODEBOOKS.items() if type(codebook) is known)
