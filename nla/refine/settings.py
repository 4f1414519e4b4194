"""The settings `refine.*`. `conf/refine/` holds the presets."""

from nla.machine.device import PRODUCTS
from nla.machine.errors import (
    UserError,
    require_at_least_zero,
    require_choice,
    require_fraction,
    require_integer,
    require_positive,
)
from nla.retrain import settings as retrain

PARTS = [part for part in retrain.PARTS if part != "linear_term"]


class Refinement:
    """The checked settings of the refinement of blocks.

    Args:
        epochs: passes over the samples.
        batch: positions (tokens of text) of a step; at least one batch of the calibration stream, which has up to 1,024.
        held_out: fraction of the samples that are not trained on. The epoch with the smallest error on them is kept.
        lr: learning rate, relative to the root mean square of each tensor at the start, for kernels whose `training_rate` is
            the default. Those of other kernels are in proportion.
        warmup: fraction of the steps in which the rate rises; afterwards it falls along a cosine.
        weight_decay, clip: as in `nla.training.loop.Recipe`.
        train: names of PARTS joined by `+`.
        products: type of the matrix products of a model in fp32 (see `products_in`); parameters and the optimiser stay in fp32.
            A model in bfloat16 has all its products in bfloat16.

    Raises:
        UserError: a value is out of range; it names the setting.
    """

    def __init__(
        self,
        epochs: int,
        batch: int,
        held_out: float,
        lr: float,
        warmup: float,
        weight_decay: float,
        clip: float,
        train: str,
        products: str,
    ) -> None:
        require_integer("refine.epochs", epochs, 1)
        require_integer("refine.batch", batch, 1)
        require_positive("refine.lr", lr)
        require_positive("refine.clip", clip)
        require_at_least_zero("refine.weight_decay", weight_decay)
        require_choice("refine.products", products, list(PRODUCTS))
        if not isinstance(held_out, int | float) or not 0 < held_out < 1:
            raise UserError(f"refine.held_out={held_out} must be a fraction, above 0 and below 1")
        require_fraction("refine.warmup", warmup)
        self.parts = str(train).split("+")
        for part in self.parts:
            require_choice("refine.train", part, PARTS)
        self.epochs, self.batch, self.held_out, self.lr, self.warmup = epochs, batch, held_out, lr, warmup
        self.weight_decay, self.clip, self.products = weight_decay, clip, PRODUCTS[products]
