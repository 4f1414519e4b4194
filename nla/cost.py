"""What a request costs, counted from shapes, and how fast this machine multiplies matrices."""

import time
from dataclasses import dataclass

import torch

from nla.config import Request

PROBE = 1024  # side of the matrices of the speed probe
TOKENS = 512  # a forward's cost per token is counted at this many


@dataclass(frozen=True)
class Cost:
    """Operations (FLOP) and operations per second; forward per token and in the selected layers only."""

    dense_forward: float
    forward: float
    fit_least: int
    fit_most: int
    rate: float


def estimate(request: Request) -> Cost:
    """Operations of fits and forward, and the measured rate."""
    sizes = [(e.spec.out_features, e.spec.in_features, e.h, e.r) for e in request.plan]
    least = sum(request.method.start_flops(*size) for size in sizes)
    return Cost(
        dense_forward=2 * sum(m * n for m, n, _, _ in sizes),
        forward=sum(request.method.kernel.forward_flops(*size, TOKENS) for size in sizes) / TOKENS,
        fit_least=least,
        fit_most=least + sum(request.method.descent_flops(*size) for size in sizes),
        rate=product_rate(request.device),
    )


def product_rate(device: str) -> float:
    """FLOP/s of fp32 matrix products with all threads."""
    a = torch.randn(PROBE, PROBE, device=device)
    begun, repeats = 0.0, 0
    for repeats in range(-2, 8):  # two to warm up
        if repeats == 0:
            float((a @ a)[0, 0])
            begun = time.perf_counter()
        b = a @ a
    float(b[0, 0])
    return (repeats + 1) * 2 * PROBE**3 / (time.perf_counter() - begun)
