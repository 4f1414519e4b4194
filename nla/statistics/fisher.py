"""Fisher information of weights from calibration data: squared gradients (FWSVD, Hsu et al., 2022)."""

import threading
from collections.abc import Callable, Sequence
from contextlib import ExitStack, closing

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nla.machine.threads import ordered_map
from nla.models.base import Model, Sample


def fisher(model: Model, layers: Sequence[str], samples: Sequence[Sample]) -> dict[str, Tensor]:
    """{layer: squared gradient of its weight, summed over outputs and averaged over samples, (in,)}.

    Each gradient is that of one sample's loss. It is squared and summed as soon as it is computed, so that no gradient of the
    whole model is in memory.
    """
    device = next(model.module.parameters()).device
    trained = {p: p.requires_grad for p in model.module.parameters()}
    model.module.requires_grad_(False)
    try:
        with Gradients(model.module, layers) as gradients:

            def squares(sample: Sample) -> dict[str, Tensor]:
                return gradients.of(lambda: model.loss(sample.to(device)))

            total: dict[str, Tensor] = {}
            with closing(ordered_map(squares, samples, device)) as results:
                for found in tqdm(results, "gradients", len(samples), unit="sample", dynamic_ncols=True):
                    for name, value in found.items():
                        total[name] = total[name] + value if name in total else value
    finally:
        for p, wanted in trained.items():
            p.requires_grad_(wanted)
    return {name: total[name] / len(samples) for name in layers}


class Gradients:
    """Context that computes squared gradients of some layers' weights in backward passes, separately for each thread."""

    def __init__(self, model: nn.Module, layers: Sequence[str]) -> None:
        self.model, self.layers = model, layers
        self.local, self.hooks = threading.local(), ExitStack()

    def __enter__(self) -> "Gradients":
        for name in self.layers:
            handle = self.model.get_submodule(name).register_forward_hook(self.hook(name))
            self.hooks.callback(handle.remove)
        return self

    def __exit__(self, *exc: object) -> None:
        self.hooks.close()

    def hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def catch(module: nn.Module, arguments: tuple[Tensor, ...], output: Tensor) -> None:
            x, found = arguments[0].detach().flatten(0, -2).float(), self.local.found

            def add(d_y: Tensor) -> None:
                gradient = d_y.flatten(0, -2).T.float() @ x  # (out, in)
                found[name] = found.get(name, 0) + gradient.square_().sum(0)

            if not output.requires_grad:  # the weights are frozen, so no earlier tensor requires a gradient
                output.requires_grad_()
            output.register_hook(add)

        return catch

    @torch.enable_grad()
    def of(self, loss: Callable[[], Tensor]) -> dict[str, Tensor]:
        """{layer: squared gradient of `loss()`, summed over outputs, (in,)}, computed in this thread."""
        self.local.found = {}
        loss().backward()
        return self.local.found
