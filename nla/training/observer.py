"""The interface for code that runs at every training step, such as budgets, constraints and histories."""

from typing import Any

from torch import Tensor


class Observer:
    """Methods that `nla.training.loop.train` calls. By default they do nothing. An observer's state is saved in checkpoints."""

    def begin(self) -> None:
        """Called before the first step, but not when a training resumes."""

    def after_gradient(self, done: int, gradients: dict[str, Tensor]) -> None:
        """Called before clipping with this process's {name: mean gradient}, which may be changed; `done`: steps so far."""

    def before_publishing(self, done: int) -> None:
        """Called after the optimiser's update, before the new numbers are copied into the model; `done` counts this step."""

    def after_step(self, done: int, figures: dict[str, float]) -> None:
        """Called at the end of a step. `figures` has loss, lr and norm (of the gradient)."""

    def tensors(self) -> dict[str, Tensor]:
        """The tensors to save in a checkpoint: all that later steps depend on."""
        return {}

    def notes(self) -> Any:
        """Other values to save in a checkpoint, as JSON."""
        return None

    def restore(self, tensors: dict[str, Tensor], notes: Any) -> None:
        """Load the state that tensors() and notes() returned when a checkpoint was saved."""
