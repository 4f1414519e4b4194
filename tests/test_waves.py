"""Cosines and sines of angles with a gradient of their own, beside autograd's."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nla.kernels.waves import waves


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 9), k=st.integers(1, 9), orders=st.lists(st.integers(1, 12), min_size=1, max_size=3))
def test_waves_and_their_gradient_are_those_of_cosines_and_sines_side_by_side(n, k, orders):
    generator = torch.Generator().manual_seed(0)
    angles = torch.randn(n, k, dtype=torch.float64, generator=generator).requires_grad_()
    expected = torch.cat([f(order * angles) for order in orders for f in (torch.cos, torch.sin)], 1)
    found = waves(angles, orders)
    torch.testing.assert_close(found, expected)
    d = torch.randn(found.shape, dtype=torch.float64, generator=generator)
    wanted = torch.autograd.grad(expected, angles, d)
    torch.testing.assert_close(torch.autograd.grad(found, angles, d), wanted)


def test_waves_of_bfloat16_angles_are_bfloat16_and_need_no_gradient():
    angles = torch.linspace(-3, 3, 12, dtype=torch.bfloat16).reshape(4, 3)
    found = waves(angles, [1])
    assert found.dtype == torch.bfloat16 and not found.requires_grad
    torch.testing.assert_close(found[:, :3], angles.cos())
