"""Masked triplets leave the model for good: at the cool-down from the training too, at its end from the result."""

from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from nla.compressed.layer import Term
from nla.compressed.terms import terms_of
from nla.matrix.triplets import Triplets
from nla.training.checkpoints import Progress
from nla.training.parameters import TrainedParameter


def drop_masked(module: nn.Module) -> None:
    """Remove the triplets with mu = 0; the model's outputs stay what they are."""
    for term in terms_of(module).values():
        term.hold(term.triplets.prune(term.mu != 0))


def drop_from_training(
    terms: Mapping[str, Term], masks: Sequence[Tensor], trained: Sequence[TrainedParameter], progress: Progress
) -> list[TrainedParameter]:
    """Remove the masked triplets from the model, and from what its optimiser keeps; what is trained from here on.

    Args:
        masks: of each term, (h,), true where a triplet stays.
    """
    kept: dict[str, tuple[nn.Parameter, Tensor]] = {}
    for (name, term), mask in zip(terms.items(), masks, strict=True):
        term.hold(term.triplets.prune(mask))
        kept |= {f"{name}.{part}": (p, mask) for part, p in term.named_parameters()}
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


def chosen(part: Tensor, mask: Tensor) -> Tensor:
    """What a mask leaves of A or B (n, h, r), or of mu (h,)."""
    return part[:, mask] if part.ndim == 3 else part[mask]


def load_retrained_terms(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Put retrained numbers into a prepared model, whose terms may have more triplets."""
    for name, term in terms_of(module).items():
        parts = [tensors[f"{name}.{part}"] for part in ("A", "B", "mu") if f"{name}.{part}" in tensors]
        if len(parts) == 3:
            term.hold(Triplets(*(part.to(term.mu.device) for part in parts)))
    module.load_state_dict(tensors, strict=False)
