"""Chooses the trained parameters of a compressed model and their learning rates, and prepares its terms for retraining."""

from collections import Counter
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nla.compressed.contents import compressed_layers, kernel_terms
from nla.compressed.layer import CompressedLinear
from nla.kernels.base import TRAINING_RATE
from nla.kernels.linear import Linear
from nla.matrix.triplets import Triplets
from nla.models.select import part_of
from nla.terms.base import Sum, Term
from nla.terms.dense import Dense
from nla.terms.kernel_term import KernelTerm
from nla.terms.rounded import RoundedTerm
from nla.training.parameters import TrainedParameter

SIZE_OF_ZEROS = 0.02  # the size that a tensor of zeros counts as, for its learning rate: the usual start of transformers


class AddedTerm(KernelTerm):
    """A linear term that retraining adds beside the fitted terms of a matrix (LoRA, Hu et al., 2022)."""


def prepare_terms(module: nn.Module, linear_term: int, seed: int) -> None:
    """Balance all triplets, and add a linear term of rank `linear_term`, whose matrix is zero, to every compressed matrix.

    Balancing makes A, B and mu similar in size and does not change the matrix (`Kernel.balanced`). Terms that share a factor
    are not balanced, because balancing one of them would unbalance the other. Rounded numbers become trainable (`pack_terms`
    leads back).
    """
    for layer in compressed_layers(module).values():
        layer.term = layer.term.trainable()
    terms = kernel_terms(module).values()
    users = Counter(id(p) for term in terms for p in term.parameters())
    for term in terms:
        if all(users[id(p)] == 1 for p in term.parameters()):
            term.hold(term.kernel.balanced(term.triplets))
    if linear_term:
        for i, layer in enumerate(compressed_layers(module).values()):
            added = zero_term(layer, linear_term, torch.Generator().manual_seed(seed + i))
            layer.term = Sum([*(layer.term.summands if isinstance(layer.term, Sum) else [layer.term]), added])


def pack_terms(module: nn.Module) -> None:
    """Store the rounded numbers of every compressed matrix as codes again, after a training."""
    for layer in compressed_layers(module).values():
        layer.term = layer.term.packed()


def zero_term(layer: CompressedLinear, rank: int, generator: torch.Generator) -> AddedTerm:
    """A linear term of this rank whose matrix is zero, as in LoRA: B is random, A = 0, mu = 1."""
    out_features, in_features = layer.term.out_features, layer.term.in_features
    B = torch.randn(in_features, rank, 1, generator=generator) * in_features**-0.5
    like = next(layer.term.parameters())
    return AddedTerm(Linear(), Triplets(torch.zeros(out_features, rank, 1), B, torch.ones(rank)).map(lambda p: p.to(like)))


def root_mean_square(p: Tensor) -> float:
    """Root mean square of a tensor. It is computed from the norm, which does not depend on the number of threads."""
    return float(torch.linalg.vector_norm(p.detach(), dtype=torch.float32)) / max(1, p.numel()) ** 0.5


def chosen_parts(module: nn.Module, parts: Sequence[str], own_rates: bool = True) -> list[TrainedParameter]:
    """The parameters that `retrain.train` names, each once, with their learning rates. All others are frozen.

    The learning rates are multiples of the recipe's.

    Args:
        parts: names of `nla.retrain.settings.PARTS`.
        own_rates: train triplets at their kernel's own rate (`Kernel.training_rate`).
    """
    wanted = set(parts)
    terms = {name: m for name, m in module.named_modules() if isinstance(m, Term)}
    term_of = {f"{name}.{part}": term for name, term in terms.items() for part, _ in term.named_parameters(recurse=False)}
    found = []
    for name, p in module.named_parameters():
        kind, term, rate = name.rpartition(".")[2], term_of.get(name), 1.0
        holder = module.get_submodule(name.rpartition(".")[0])
        if term is not None:
            compressed = "triplets" in wanted and not isinstance(term, Dense)
            chosen = kind in wanted or compressed or (isinstance(term, AddedTerm) and "linear_term" in wanted)
            if own_rates and isinstance(term, KernelTerm | RoundedTerm):
                rate = term.kernel.training_rate / TRAINING_RATE
        else:
            chosen = part_of(holder, kind) in wanted
        if chosen or "everything" in wanted:
            found.append(TrainedParameter(name, p.requires_grad_(), rate * (root_mean_square(p) or SIZE_OF_ZEROS)))
        else:
            p.requires_grad_(False)
    return found
