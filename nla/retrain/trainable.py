"""Which parameters of a compressed model are trained, and in which gauge."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nla.compressed.layer import CompressedLinear, Term
from nla.compressed.terms import terms_of
from nla.kernels.linear import Linear
from nla.machine.errors import UserError
from nla.matrix.triplets import Triplets
from nla.training.parameters import TrainedParameter

NOTHING = 0.02  # size of a tensor that begins at zero, for its learning rate: what transformers start weights with


def prepare_terms(module: nn.Module, linear_term: int, seed: int) -> None:
    """Balance every term's triplets, and give every compressed matrix a linear term of zero beside it."""
    for i, layer in enumerate(m for m in module.modules() if isinstance(m, CompressedLinear)):
        for term in layer.parts():
            term.hold(term.kernel.balanced(term.triplets))
        if linear_term:
            generator = torch.Generator().manual_seed(seed + i)
            layer.terms.append(zero_term(layer.parts()[0].triplets, linear_term, generator))


def zero_term(like: Triplets, rank: int, generator: torch.Generator) -> Term:
    """A linear term whose matrix is zero: B at random, A = 0, mu = 1 (LoRA, Hu et al., 2022)."""
    B = torch.randn(like.in_features, rank, 1, generator=generator) * like.in_features**-0.5
    A = torch.zeros(like.out_features, rank, 1)
    return Term(Linear(), Triplets(A, B, torch.ones(rank)).map(lambda p: p.to(like.A)))


def root_mean_square(p: Tensor) -> float:
    """The size of a tensor's numbers; as a norm, which torch adds up in the same order whatever the number of threads."""
    return float(torch.linalg.vector_norm(p.detach(), dtype=torch.float32)) / max(1, p.numel()) ** 0.5


def chosen_parts(module: nn.Module, parts: Sequence[str]) -> list[TrainedParameter]:
    """The parameters that `retrain.train` names, each once, with their own learning rates.

    Raises:
        UserError: there are none.
    """
    wanted = {"A", "B", "mu"} if "triplets" in parts else set()
    wanted |= set(parts)
    in_terms = {f"{name}.{part}" for name in terms_of(module) for part in ("A", "B", "mu")}
    extra = {name for name in in_terms if ".terms.0." not in name}
    found = []
    for name, p in module.named_parameters():
        kind = name.rpartition(".")[2]
        owner = module.get_submodule(name.rpartition(".")[0])
        if name in in_terms:
            chosen = kind in wanted or (name in extra and "linear_term" in wanted)
        elif "norm" in type(owner).__name__.lower():
            chosen = "norms" in wanted
        else:
            chosen = kind == "bias" and "biases" in wanted
        if chosen or "everything" in wanted:
            found.append(TrainedParameter(name, p.requires_grad_(), root_mean_square(p) or NOTHING))
        else:
            p.requires_grad_(False)
    if not found:
        raise UserError(f"retrain.train={'+'.join(parts)} names no parameter of this model")
    return found
