"""The terms of a compressed model, counts of its parameters and bits, and replacement of parameters."""

from collections.abc import Mapping

from torch import Tensor, nn

from nla.compressed.layer import CompressedLinear
from nla.terms.base import Term, shares
from nla.terms.kernel_term import KernelTerm


def compressed_layers(module: nn.Module) -> dict[str, CompressedLinear]:
    """The compressed layers by qualified name."""
    return {name: m for name, m in module.named_modules() if isinstance(m, CompressedLinear)}


def matrix_terms(module: nn.Module) -> dict[str, Term]:
    """The term of every compressed matrix, by the qualified name of its layer."""
    return {name: layer.term for name, layer in compressed_layers(module).items()}


def kernel_terms(module: nn.Module) -> dict[str, KernelTerm]:
    """Every KernelTerm of the model, by its qualified name. A Sum may contain several."""
    return {name: m for name, m in module.named_modules() if isinstance(m, KernelTerm)}


def matrix_of(term_name: str, matrices: Mapping[str, Term]) -> str:
    """Name of the matrix to which the term with this qualified name belongs."""
    return next(name for name in matrices if f"{term_name}.".startswith(f"{name}.term."))


def matrix_counts(module: nn.Module) -> dict[str, tuple[int, int]]:
    """(numbers, bits) of every compressed matrix, by name. A tensor shared by several counts for the first of them."""
    terms = matrix_terms(module)
    return dict(zip(terms, shares(list(terms.values())), strict=True))


def other_parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters outside the terms, such as norms and embeddings, by qualified name. Tied ones are there once."""
    in_terms = {id(p) for term in matrix_terms(module).values() for p in term.parameters()}
    return {name: p for name, p in module.named_parameters() if id(p) not in in_terms}


def count_parameters(module: nn.Module) -> int:
    """Number of parameters of a model. Tied parameters count once, and masked triplets (mu = 0) do not count."""
    others = sum(p.numel() for p in other_parameters(module).values())
    return others + sum(numbers for numbers, _ in matrix_counts(module).values())


def count_bits(module: nn.Module) -> int:
    """Bits that storing the parameters of a model takes, counted as in count_parameters()."""
    others = sum(8 * p.numel() * p.element_size() for p in other_parameters(module).values())
    return others + sum(bits for _, bits in matrix_counts(module).values())


def replace_parameters(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Replace parameters, by name, by these tensors, whose shapes may differ. A shared parameter stays shared."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for holder in module.modules():
        for attribute, parameter in holder.named_parameters(recurse=False):
            places.setdefault(id(parameter), []).append((holder, attribute))
    for name, tensor in tensors.items():
        old = module.get_parameter(name)
        new = nn.Parameter(tensor.detach().to(old.device), requires_grad=old.requires_grad)
        for holder, attribute in places[id(old)]:
            setattr(holder, attribute, new)
