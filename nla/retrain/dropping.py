"""Drops masked triplets (mu = 0) for good: at the beginning of the cool-down, and at the end of retraining."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from nla.compressed.contents import kernel_terms
from nla.terms.kernel_term import TENSORS, KernelTerm
from nla.training.checkpoints import Progress
from nla.training.parameters import TrainedParameter


def drop_masked(module: nn.Module) -> None:
    """Remove all triplets with mu = 0 from the model, in place. Its outputs do not change."""
    for term in kernel_terms(module).values():
        keep = term.mu != 0
        if not bool(keep.all()):
            term.hold(term.triplets.prune(keep))


def drop_from_training(
    terms: Mapping[str, KernelTerm], masks: Sequence[Tensor], trained: Sequence[TrainedParameter], progress: Progress
) -> list[TrainedParameter]:
    """Remove the masked triplets from the model and from the optimiser's state. Returns the parameters to train from now on.

    Args:
        terms: the terms by name, changed in place.
        masks: (h,) for each term, true where a triplet stays.
        trained: the parameters that were trained until now.
        progress: holds the optimiser's state, changed in place.
    """
    kept: dict[str, tuple[nn.Parameter, Tensor]] = {}
    for (name, term), mask in zip(terms.items(), masks, strict=True):
        term.hold(term.triplets.prune(mask))
        kept |= {f"{name}.{part}": (getattr(term, part), mask) for part in TENSORS}
    left = []
    for t in trained:
        if t.name not in kept:
            left.append(t)
            continue
        parameter, mask = kept[t.name]
        left.append(TrainedParameter(t.name, parameter, t.rate, t.owner))
        if t.name in progress.moments:  # this process keeps the parameter's optimiser state
            moments = progress.moments[t.name]
            progress.moments[t.name] = {name: chosen(m, mask) if m.ndim else m for name, m in moments.items()}
            if t.master.dtype != parameter.dtype:
                left[-1].master = chosen(t.master, mask)
    return left


def chosen(tensor: Tensor, mask: Tensor) -> Tensor:
    """The part of A or B (n, h, r), or of mu (h,), that belongs to the triplets where the mask (h,) is true."""
    return tensor[:, mask] if tensor.ndim == 3 else tensor[mask]
