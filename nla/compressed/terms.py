"""Find, save and load the terms of a compressed model."""

from torch import Tensor, nn

from nla.compressed.layer import CompressedLinear, Term
from nla.compressed.surgery import get_linear
from nla.kernels.base import Kernel
from nla.matrix.triplets import Triplets


def terms_of(module: nn.Module) -> dict[str, Term]:
    """All terms of a compressed model, by their qualified names."""
    return {name: m for name, m in module.named_modules() if isinstance(m, Term)}


def save_terms(module: nn.Module) -> dict[str, Tensor]:
    """A, B and mu of every compressed matrix, by the names of their parameters."""
    return {f"{name}.{part}": p.detach() for name, term in terms_of(module).items() for part, p in term.named_parameters()}


def load_terms(module: nn.Module, saved: dict[str, Tensor], kernel: Kernel, device: str) -> None:
    """Compress a dense model to these terms, one a matrix."""
    for name in sorted({key.partition(".terms.")[0] for key in saved}):
        dense = get_linear(module, name)
        triplets = Triplets(*(saved[f"{name}.terms.0.{part}"].to(device) for part in ("A", "B", "mu")))
        module.set_submodule(name, CompressedLinear(((kernel, triplets),), dense.bias))
