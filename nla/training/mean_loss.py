"""The mean of a loss over samples, without a gradient."""

from collections.abc import Callable, Sequence
from contextlib import closing

import torch
from torch import Tensor

from nla.machine.threads import ordered_map
from nla.models.base import Sample


def mean_loss(loss: Callable[[Sample], Tensor], samples: Sequence[Sample], device: torch.device) -> float:
    """The mean of a loss over the samples, which are moved to `device` one by one."""

    @torch.no_grad()
    def of_sample(sample: Sample) -> float:
        return float(loss(sample.to(device)))

    with closing(ordered_map(of_sample, samples, device)) as losses:
        return sum(losses) / len(samples)
