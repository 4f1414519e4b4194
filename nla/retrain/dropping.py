"""Masked triplets leave the model for good: from the training when the cool-down begins, from the model at its end."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from nla.compressed.contents import kernel_terms, replace_parameters
from nla.terms.kernel_term import PARTS, KernelTerm
from nla.training.checkpoints import Progress
from nla.training.parameters import TrainedParameter


def drop_masked(module: nn.Module) -> None:
    """Remove the triplets with mu = 0. The model's outputs stay what they are."""
    for term in kernel_terms(module).values():
        keep = term.mu != 0
        if not bool(keep.all()):
            term.hold(term.triplets.prune(keep))


def drop_from_training(
    terms: Mapping[str, KernelTerm], masks: Sequence[Tensor], trained: Sequence[TrainedParameter], progress: Progress
) -> list[TrainedParameter]:
    """Remove the masked triplets from the model, and from what its optimiser keeps. Returns what is trained from here on.

    Args:
        masks: of each term, (h,), true where a triplet stays.
    """
    kept: dict[str, tuple[nn.Parameter, Tensor]] = {}
    for (name, term), mask in zip(terms.items(), masks, strict=True):
        term.hold(term.triplets.prune(mask))
        kept |= {f"{name}.{part}": (getattr(term, part), mask) for part in PARTS}
    left = []
    for t in trained:
        if t.name not in kept:
            left.append(t)
            continue
        parameter, mask = kept[t.name]
        left.append(TrainedParameter(t.name, parameter, t.rate, t.owner))
        if t.name in progress.moments:  # this process has its numbers
            moments = progress.moments[t.name]
            progress.moments[t.name] = {name: chosen(m, mask) if m.ndim else m for name, m in moments.items()}
            if t.master.dtype != parameter.dtype:
                left[-1].master = chosen(t.master, mask)
    return left


def chosen(tensor: Tensor, mask: Tensor) -> Tensor:
    """What a mask leaves of A or B (n, h, r), or of mu (h,)."""
    return tensor[:, mask] if tensor.ndim == 3 else tensor[mask]


def load_retrained(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put retrained numbers into a prepared model, whose terms may have more triplets."""
    replace_parameters(module, tensors)
    drop_masked(module)
