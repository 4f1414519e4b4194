"""Parts of matrices that are in memory at once."""

from collections.abc import Iterator

import torch
from torch import Tensor

PANEL = 2**19  # numbers of a matrix in memory at once; enough rows for a matrix product at full speed
TILE = {"cpu": 2**17, "cuda": 2**25}  # numbers evaluated at once: 0.5 MiB in fp32 fits a core's cache; a GPU needs larger ones


def slices(total: int, width: int) -> Iterator[slice]:
    """Slices of `width`, at least 1, that cover range(total)."""
    width = max(1, width)
    return (slice(start, min(start + width, total)) for start in range(0, total, width))


def widen(p: Tensor) -> Tensor:
    """The tensor in fp32, or unchanged if its type is wider."""
    return p.to(torch.promote_types(p.dtype, torch.float32))
