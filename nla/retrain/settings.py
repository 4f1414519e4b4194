"""The settings `retrain.*`. `conf/retrain/` holds the presets."""

from typing import Any

from nla.kernels.base import TRAINING_RATE
from nla.machine.device import PRODUCTS
from nla.machine.errors import (
    UserError,
    require_at_least_zero,
    require_choice,
    require_fraction,
    require_integer,
    require_positive,
)
from nla.training.loop import Recipe

PARTS = ["triplets", "A", "B", "mu", "linear_term", "norms", "biases", "everything"]
MOST_SAMPLES = 1_000_000  # of a step


class Retraining:
    """The checked settings of a retraining.

    Args:
        steps: optimiser steps T of all stages together; 0 for no retraining.
        data: the training split of a data set; None if steps = 0.
        batch: samples per step; micro: samples of a step that one worker (or GPU) runs at once.
        length: tokens per sample, if the data is text.
        lr: learning rate, relative to the root mean square of each tensor at the start; None for each kernel's own rate.
        warmup: fraction of a stage's steps in which the rate rises; afterwards it falls along a cosine.
        weight_decay, clip, spike, checkpoint: as in `nla.training.loop.Recipe`.
        train: the stages, which share the steps equally. A stage is one or more names of PARTS joined by `+`.
        linear_term: rank of a linear term (LoRA) that every matrix gets beside its triplets, paid from the matrix's budget.
        logits, features, perturbation, temperature: weights and temperature of `nla.retrain.losses.Distillation`.
        products: type of the matrix products of a model in fp32 (see `products_in`); parameters and the optimiser stay in fp32.
            A model in bfloat16 has all its products in bfloat16.
        recompute: keep only the inputs of blocks, and recompute their activations in the backward pass.
        watch: held-out samples of the first task's data whose loss is shown at every checkpoint, for information only.
        processes: number of processes that train together, one GPU each if there are GPUs. They divide the micro-batches,
            gradients, optimiser state and importance scores. Each holds all weights.

    Raises:
        UserError: a value is out of range or contradicts another one; it names the setting.
    """

    def __init__(
        self,
        steps: int,
        data: Any,
        batch: int,
        micro: int,
        length: int,
        lr: float | None,
        warmup: float,
        weight_decay: float,
        clip: float,
        spike: float,
        train: list[str],
        linear_term: int,
        logits: float,
        features: float,
        perturbation: float,
        temperature: float,
        products: str,
        recompute: bool,
        checkpoint: int,
        watch: int,
        processes: int,
    ) -> None:
        for name, value, least in (
            ("steps", steps, 0),
            ("batch", batch, 1),
            ("micro", micro, 1),
            ("length", length, 2),
            ("linear_term", linear_term, 0),
            ("checkpoint", checkpoint, 1),
            ("watch", watch, 0),
            ("processes", processes, 1),
        ):
            require_integer(f"retrain.{name}", value, least)
        self.own_rates, lr = lr is None, TRAINING_RATE if lr is None else lr
        for name, number in (
            ("lr", lr),
            ("clip", clip),
            ("spike", spike),
            ("temperature", temperature),
        ):
            require_positive(f"retrain.{name}", number)
        for name, number in (
            ("weight_decay", weight_decay),
            ("logits", logits),
            ("features", features),
            ("perturbation", perturbation),
        ):
            require_at_least_zero(f"retrain.{name}", number)
        require_fraction("retrain.warmup", warmup)
        require_choice("retrain.products", products, list(PRODUCTS))
        require_choice("retrain.recompute", recompute, [True, False])
        if not isinstance(train, list) or not train:
            raise UserError(f"retrain.train={train} must be a list of stages, such as [triplets+norms]")
        for name in [name for stage in train for name in str(stage).split("+")]:
            require_choice("retrain.train", name, PARTS)
        named = {part for stage in train for part in str(stage).split("+")}
        if "linear_term" in named and not linear_term:
            raise UserError(f"retrain.train={train} names a linear term of rank 0; set retrain.linear_term")
        if linear_term and not named & {"linear_term", "triplets", "A", "everything"}:
            raise UserError(f"retrain.linear_term={linear_term} is zero until trained; name it in retrain.train={train}")
        if steps % len(train):
            raise UserError(f"retrain.steps={steps} must be a multiple of the {len(train)} stages of retrain.train={train}")
        if batch > MOST_SAMPLES:
            raise UserError(f"retrain.batch={batch} must be {MOST_SAMPLES} at most")
        if batch % micro:
            raise UserError(f"retrain.batch={batch} must be a multiple of retrain.micro={micro}: micro-batches count the same")
        if batch // micro % processes:
            raise UserError(
                f"retrain.processes={processes} cannot share the {batch // micro} micro-batches of "
                f"retrain.batch={batch} evenly; allowed: a divisor of {batch // micro}, or another batch"
            )
        self.steps, self.data, self.batch, self.micro, self.length = steps, data, batch, micro, length
        self.train, self.recompute = [stage.split("+") for stage in train], recompute
        self.products = PRODUCTS[products]
        self.linear_term = linear_term if steps else 0
        self.logits, self.features, self.perturbation, self.temperature = logits, features, perturbation, temperature
        self.watch, self.processes = watch, processes
        each = steps // len(train)
        self.recipe = Recipe(each, lr, int(warmup * each), weight_decay, clip, checkpoint, spike)

    @property
    def distils(self) -> bool:
        """Whether the loss compares with the dense model, its outputs or its weights, so that it is loaded too."""
        return self.compares or self.perturbation > 0

    @property
    def compares(self) -> bool:
        """Whether the loss compares with outputs of the dense model, which then reads every sample too."""
        return max(self.logits, self.features) > 0
