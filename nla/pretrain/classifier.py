"""A small image classifier that the harness trains on first use. It needs no download of weights."""

import logging
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from nla.machine.cache import Cache, digest
from nla.machine.errors import UserError, require_integer
from nla.machine.provenance import code_digest, computing_packages
from nla.machine.sealed_folder import sealed_folder
from nla.machine.seeds import seed_of
from nla.models.base import Sample, VisionModel
from nla.models.vision import ImageClassifier, classifier, from_architecture, load_weights
from nla.training.loop import Recipe, train
from nla.training.parameters import whole_model
from tasks.data.base import training_set
from tasks.data.images import Images, Items

log = logging.getLogger(__name__)

MICRO_BATCH = 32  # images of one worker: fixed, because the sum of gradients must not depend on the number of workers


class MicroModel(ImageClassifier):
    """A model of any timm architecture, trained on first use and kept in the cache.

    Args:
        name: shown in messages, and part of the folder's name.
        training: a node of conf/data. The model is trained on the training split of its images.
        weights_seed: seed of the initial weights and of the batches.
        batch: images per step, drawn with replacement. Micro-batches of 32 have equal weights, so it is a multiple of 32.
        shift: largest random shift of an image, in pixels of the model's input, vertically and horizontally.
        recipe: steps, lr, warmup, weight_decay, clip as in `nla.training.loop.Recipe`.
        dtype: the run's default type, which the configuration reads; not used here.
        architecture: timm's name under `model`, and arguments of timm.create_model.
    """

    def __init__(
        self,
        name: str,
        training: dict[str, Any],
        weights_seed: int,
        batch: int,
        shift: int,
        recipe: dict[str, Any],
        dtype: str,
        architecture: dict[str, Any],
    ) -> None:
        require_integer("model.batch", batch, 1)
        if batch > MICRO_BATCH and batch % MICRO_BATCH:
            raise UserError(f"model.batch={batch} must be a multiple of {MICRO_BATCH}, so that all images count alike")
        require_integer("model.weights_seed", weights_seed, 0)
        require_integer("model.shift", shift, 0)
        self.training: Images = training_set("calibration", training, "images")
        self.name, self.weights_seed, self.batch, self.shift = name, weights_seed, batch, shift
        self.recipe, self.architecture = Recipe(**recipe), dict(architecture)

    def configuration(self, cache: Cache) -> dict[str, Any]:
        return self.architecture

    def identity(self, cache: Cache) -> str:
        return self.training.identity(cache)

    def check(self, dtype: str, cache: Cache) -> None:
        self.training.check()

    def load(self, device: str, dtype: str, cache: Cache) -> VisionModel:
        module = from_architecture(self.architecture)
        load_weights(module, self.folder(cache) / "model.safetensors")
        return classifier(module, device, dtype)

    def folder(self, cache: Cache) -> Path:
        """Folder with the trained weights in fp32. The first call trains the model, on the CPU."""
        made_from = {
            "architecture": self.architecture,
            "recipe": [vars(self.recipe), self.batch, self.shift, MICRO_BATCH],
            "data": [self.training.name, self.training.split, self.training.identity(cache)],
            "seed": self.weights_seed,
            "code": code_digest(__name__, type(self.training).__module__),
            "packages": computing_packages() | {package: version(package) for package in ("timm", "torchvision", "pillow")},
        }
        key = digest(made_from)

        def make(folder: Path, scratch: Path) -> None:
            from safetensors.torch import save_file

            items = self.training.items()
            log.info(
                "training %s on %d images of %s, once (%d steps)", self.name, len(items), self.training.name, self.recipe.steps
            )
            model = classifier(from_architecture(self.architecture, self.weights_seed), "cpu", "float32")
            batches = self.batches(items, model)
            train(whole_model(model.module), model.loss, batches, self.recipe, cache, key, f"training {self.name}")
            save_file({name: p.contiguous() for name, p in model.module.state_dict().items()}, folder / "model.safetensors")

        made = sealed_folder(cache, "models", f"{self.name}-{key[:16]}", make)
        cache.remove("trainings", key)  # the checkpoint of the training, which is finished
        return made

    def batches(self, items: Items, model: VisionModel) -> Callable[[int], list[Sample]]:
        """A function: step -> its micro-batches, which depend on the seed and the step alone."""

        def batch(step: int) -> list[Sample]:
            generator = torch.Generator().manual_seed(seed_of(self.weights_seed, step))
            chosen = torch.randint(len(items), (self.batch,), generator=generator).tolist()
            shifts = torch.randint(2 * self.shift + 1, (self.batch, 2), generator=generator).tolist()
            drawn = [items[i] for i in chosen]
            images = [shifted(model.transform(image), self.shift, by) for (image, _), by in zip(drawn, shifts, strict=True)]
            labels = torch.tensor([label for _, label in drawn])
            parts = zip(torch.stack(images).split(MICRO_BATCH), labels.split(MICRO_BATCH), strict=True)
            return [Sample(*part) for part in parts]

        return batch


def shifted(image: Tensor, most: int, by: list[int]) -> Tensor:
    """The image (channels, height, width), moved down and right by `most - by` pixels. The gap is filled with its border."""
    down, right = by
    larger = pad(image, (most, most, most, most), mode="replicate")
    return larger[:, down : down + image.shape[1], right : right + image.shape[2]]
