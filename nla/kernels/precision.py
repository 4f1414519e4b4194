"""Forward passes with hand-written gradients, under torch.autocast."""

from collections.abc import Callable

import torch
from torch import Tensor

from nla.matrix.triplets import Triplets


def without_autocast(forward: Callable[..., Tensor], t: Triplets, x: Tensor) -> Tensor:
    """forward(x, A, B, mu), computed in the type of the triplets also where torch.autocast would compute in a narrower one.

    Terms of opposite sign cancel in such a forward pass, and its gradient is written for one type.
    """
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return forward(x, *t.tensors)
    with torch.autocast(device, enabled=False):
        return forward(x.to(t.mu.dtype), *t.tensors)
