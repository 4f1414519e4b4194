"""What goes along with a training."""

from typing import Any

from torch import Tensor


class Observer:
    """Goes along with a training: sees its gradients and steps, and is kept with its checkpoints."""

    def begin(self) -> None:
        """Before the first step; not after a restore."""

    def after_gradient(self, done: int, gradients: dict[str, Tensor]) -> None:
        """With the mean gradient of the step after `done`, of what this process owns; may change it, before it is clipped."""

    def before_publishing(self, done: int) -> None:
        """After the optimiser has moved the masters, before the model sees them."""

    def after_step(self, done: int, figures: dict[str, float]) -> None:
        """At the end of a step; `figures`: loss, lr and norm of the gradient."""

    def tensors(self) -> dict[str, Tensor]:
        """All tensors that its next steps depend on."""
        return {}

    def notes(self) -> Any:
        """What else it needs, as JSON."""
        return None

    def restore(self, tensors: dict[str, Tensor], notes: Any) -> None:
        """Be as it was when tensors() and notes() were kept."""
