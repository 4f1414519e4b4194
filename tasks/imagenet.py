"""Accuracy of an image classifier on labelled images."""

import time
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode

from nla.machine.cache import Cache, digest
from nla.machine.errors import NonFiniteError, UserError, require_integer
from nla.machine.peak_memory import PeakMemory
from nla.models.base import Inventory, VisionModel
from tasks.base import Figures, Task, accuracy, resident_bytes, scored_in_parts
from tasks.data.images import Images, Items


class ImageNet(Task):
    """Top-1 and top-5 accuracy and cross entropy of an image classifier. Batches are independent of each other.

    Args:
        batch: images in a batch.
        max_images: measure only the first so many images; null for all.
    """

    name = "imagenet"
    reads = "images"
    data: Images

    def __init__(self, data: Images, batch: int, max_images: int | None) -> None:
        require_integer("task.batch", batch, 1)
        require_integer("task.max_images", 1 if max_images is None else max_images, 1)
        self.data, self.batch, self.max_images = data, batch, max_images

    def check(self, inventory: Inventory) -> None:
        super().check(inventory)
        if self.data.classes > inventory.limit:
            raise UserError(
                f"data={self.data.name} has {self.data.classes} classes, the model knows {inventory.limit}; "
                "choose the data that the model was trained for"
            )

    def evaluate(self, model: VisionModel, cache: Cache, state: str, label: str) -> dict[str, Figures]:  # type: ignore[override]
        """Figures as in `summary`. Each batch is stored as soon as it is scored.

        Raises:
            NonFiniteError: logits are not finite; it names the batch and its images.
        """
        items = self.data.items()
        parts = list(range(len(items))[: self.max_images])
        batches = [parts[i : i + self.batch] for i in range(0, len(parts), self.batch)]
        key = digest([state, self.data.name, self.data.split, self.data.identity(cache), len(items), self.batch])
        device = next(model.module.parameters()).device

        def score(i: int) -> dict[str, float]:
            where = f"data={self.data.name}, batch {i} (images {batches[i][0]} to {batches[i][-1]})"
            return score_batch(model, *opened(model, items, batches[i]), where)

        def whole(i: int, result: dict[str, Any]) -> bool:
            # an earlier run with a smaller max_images may have stored a smaller last batch
            return bool(result["images"] == len(batches[i]))

        results = scored_in_parts(score, len(batches), cache, ("images", key), device, (label, "batch"), whole)
        first, _ = opened(model, items, [0])
        figures = summary(results, len(items), flops(model, first), resident_bytes(model.module))
        return {self.data.name: figures}


def opened(model: VisionModel, items: Items, part: list[int]) -> tuple[Tensor, Tensor]:
    """The images numbered `part` as model inputs (batch, channels, height, width), and their labels (batch,)."""
    device = next(model.module.parameters()).device
    images, labels = zip(*(items[i] for i in part), strict=True)
    return torch.stack([model.transform(image) for image in images]).to(device), torch.tensor(labels, device=device)


@torch.inference_mode()
def score_batch(model: VisionModel, images: Tensor, labels: Tensor, where: str) -> dict[str, float]:
    """Numbers of images with the label at the largest logit, and among the five largest; summed cross entropy (nats); seconds;
    peak bytes.

    Of equal logits, the lower class comes first. With five classes or fewer, every label is among the first five.

    Raises:
        NonFiniteError: logits are not finite; it names `where`.
    """
    begun = time.perf_counter()
    with PeakMemory(images.device) as memory:
        logits = model.logits(images).float()
        if not logits.isfinite().all():
            raise NonFiniteError(f"{where}: {int((~logits.isfinite()).any(1).sum())} images have logits that are not finite")
        best = logits.argsort(dim=1, descending=True, stable=True)[:, :5]
        hits = best == labels[:, None]
        loss = float(cross_entropy(logits, labels, reduction="sum"))
    return {
        "images": len(labels),
        "top1": int(hits[:, 0].sum()),
        "top5": int(hits.sum()),
        "loss": loss,
        "seconds": time.perf_counter() - begun,
        "peak_bytes": memory.peak_bytes,
    }


def flops(model: VisionModel, images: Tensor) -> int:
    """Floating-point operations of a forward pass, counted by torch. A multiply-add is two operations.

    Matrix products, convolutions and attention are counted. Elementwise operations (norms, activations, a tiled kernel's
    reconstruction) are not.
    """
    # fused attention is not counted on every device, its two matrix products are
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model.logits(images)
    return counter.get_total_flops()


def summary(results: list[dict[str, Any]], available: int, flops_per_image: int, resident: int) -> dict[str, float]:
    """top1 and top5 (fractions) with standard errors; loss (nats per image); images, images_available; flops_per_image of the
    forward pass; images_per_second and seconds of one worker (a thread, or the GPU) without opening the images; peak_bytes of
    one batch without its inputs; resident_bytes of the model."""
    images = sum(r["images"] for r in results)
    seconds = sum(r["seconds"] for r in results)
    top1, top5 = (accuracy(metric, sum(r[metric] for r in results), images) for metric in ("top1", "top5"))
    return {
        **top1,
        **top5,
        "loss": sum(r["loss"] for r in results) / images,
        "images": images,
        "images_available": available,
        "flops_per_image": flops_per_image,
        "images_per_second": images / seconds,
        "seconds": seconds,
        "peak_bytes": max(r["peak_bytes"] for r in results),
        "resident_bytes": resident,
    }
