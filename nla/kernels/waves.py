"""Cosines and sines of angles, with a gradient that computes neither of them again."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


def waves(angles: Tensor, orders: Sequence[int]) -> Tensor:
    """cos(order x) and sin(order x) of angles x, order after order: (n, k) -> (n, 2 k len(orders)).

    Autograd's own gradients would compute each cosine and sine a second time, and would need a copy to join the columns.
    """
    found: Tensor = Waves.apply(angles, tuple(orders))
    return found


class Waves(torch.autograd.Function):
    """The function `waves`."""

    @staticmethod
    def forward(ctx: Any, angles: Tensor, orders: tuple[int, ...]) -> Tensor:
        found = angles.new_empty(len(angles), 2 * len(orders), angles.shape[1])
        for i, order in enumerate(orders):
            turned = angles if order == 1 else order * angles
            torch.cos(turned, out=found[:, 2 * i])
            torch.sin(turned, out=found[:, 2 * i + 1])
        ctx.orders = orders
        ctx.save_for_backward(found)
        return found.flatten(1)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor, None]:
        (found,) = ctx.saved_tensors
        d, total = d.view_as(found), torch.zeros_like(found[:, 0])
        for i, order in enumerate(ctx.orders):
            total.addcmul_(d[:, 2 * i + 1], found[:, 2 * i], value=order)
            total.addcmul_(d[:, 2 * i], found[:, 2 * i + 1], value=-order)
        return total, None
