"""Labelled images from a package, local files, or the hub."""

import gzip
import importlib.util
from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm import tqdm

from nla.machine.cache import Cache, digest
from nla.machine.errors import UserError, require_integer
from nla.machine.files import file_digest, version_of
from nla.models.base import Model, Sample, VisionModel
from tasks.data.base import Data
from tasks.data.hub import fetched

if TYPE_CHECKING:
    from PIL.Image import Image

DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist puts its files


class Items(Sequence):
    """A sequence of pairs (image, label). An image is opened only when its pair is read."""

    def __init__(self, labels: Sequence[int], image: Callable[[int], "Image"]) -> None:
        self.labels, self.image = labels, image

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Any) -> tuple["Image", int]:
        i = range(len(self.labels))[index]
        return self.image(i), int(self.labels[i])


class Images(Data):
    """A named sequence of images with labels from 0 to classes - 1."""

    kind = "images"
    classes: int

    @abstractmethod
    def identity(self, cache: Cache) -> str:
        """Digest of all that the images depend on, besides name and split."""

    @abstractmethod
    def items(self) -> Items:
        """All images and their labels, in a fixed order."""

    @cached_property
    def opened(self) -> Items:
        """`items()`, read only once, for callers that draw samples at every step."""
        return self.items()

    def check(self) -> None:
        self.items()

    def samples(self, model: Model, count: int, length: int, seed: int) -> list[Sample]:
        """Random images as model inputs. No image is repeated before all have been drawn. `length` is for text only."""
        assert isinstance(model, VisionModel)
        items, generator = self.opened, torch.Generator().manual_seed(seed)
        rounds = range(-(-count // len(items)))
        order = torch.cat([torch.randperm(len(items), generator=generator) for _ in rounds])[:count].tolist()
        chosen = (items[i] for i in order)
        return [Sample(model.transform(image)[None], torch.tensor([label])) for image, label in chosen]


class Digits(Images):
    """The 1,797 handwritten digits of scikit-learn, 8 x 8 pixels of 17 greys.

    Args:
        held_out_fraction: fraction of the images in the split `test`. The others are the split `train`.
    """

    classes = 10

    def __init__(self, name: str, held_out_fraction: float) -> None:
        if not 0 < held_out_fraction < 1:
            raise UserError(f"data.images.held_out_fraction={held_out_fraction} must be above 0 and below 1")
        self.name, self.held_out_fraction = name, held_out_fraction

    def items(self) -> Items:
        import numpy as np
        from PIL import Image
        from sklearn.datasets import load_digits

        digits = load_digits()
        order = np.random.RandomState(0).permutation(len(digits.target))  # numpy never changes the numbers of RandomState
        held_out = round(self.held_out_fraction * len(order))
        chosen = order[:held_out] if self.split == "test" else order[held_out:]
        pixels = np.round(digits.images[chosen] * (255 / 16)).astype(np.uint8)
        return Items(digits.target[chosen].tolist(), lambda i: Image.fromarray(pixels[i]))

    def check(self) -> None:
        if importlib.util.find_spec("sklearn") is None:
            raise UserError("data=digits needs the package scikit-learn: pip install scikit-learn")

    def identity(self, cache: Cache) -> str:
        return digest(self.held_out_fraction)

    def share_in(self, learnt: Data) -> float:
        return max(0.0, 1 - learnt.held_out_fraction / self.held_out_fraction) if isinstance(learnt, Digits) else 0.0


class FashionMnist(Images):
    """Fashion-MNIST (Xiao et al., 2017) in its authors' IDX files: 28 x 28 grey pixels, 60,000 images to train, 10,000 to test.

    Args:
        path: folder with the files, compressed (.gz) or not; null for the folder of Debian's package.
    """

    classes = 10

    def __init__(self, name: str, path: str | None) -> None:
        self.name = name
        self.path = DEBIAN if path is None else Path(path).expanduser()

    def items(self) -> Items:
        from PIL import Image

        pixels, labels = (read_idx(file) for file in self.files())
        if pixels.ndim != 3 or labels.ndim != 1 or len(pixels) != len(labels) or len(labels) == 0:
            shapes = f"{tuple(pixels.shape)} and {tuple(labels.shape)}"
            raise UserError(f"{self.path} does not hold images and as many labels, but arrays {shapes}; fetch the files again")
        return Items(labels.tolist(), lambda i: Image.fromarray(pixels[i].numpy()))

    def files(self) -> list[Path]:
        """The file of the images and the file of the labels."""
        part = "t10k" if self.split == "test" else "train"
        return [self.file(f"{part}-images-idx3-ubyte"), self.file(f"{part}-labels-idx1-ubyte")]

    def file(self, name: str) -> Path:
        """The file `name` or `name`.gz in the folder. Raises UserError if both are missing."""
        for path in (self.path / name, self.path / f"{name}.gz"):
            if path.is_file():
                return path
        raise UserError(
            f"data={self.name} finds no {name} or {name}.gz in {self.path}; give data.path=<folder with it> "
            f"(calibration={self.name} calibration.path= for training images elsewhere), "
            "or install Debian's package dataset-fashion-mnist"
        )

    def identity(self, cache: Cache) -> str:
        return digest([cache.file_digest(file) for file in self.files()])


def read_idx(file: Path) -> torch.Tensor:
    """The array in an IDX file: uint8, of the shape in its header. Raises UserError if the file is damaged."""
    try:
        data = bytearray(gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes())
        kind, dimensions = data[2], data[3]
        shape = [int.from_bytes(data[i : i + 4], "big") for i in range(4, 4 + 4 * dimensions, 4)]
        if data[:2] != b"\0\0" or kind != 8:
            raise ValueError("its header is not that of an array of bytes")
        return torch.frombuffer(data, dtype=torch.uint8, offset=4 + 4 * dimensions).view(shape)
    except (OSError, EOFError, IndexError, ValueError, RuntimeError) as error:
        raise UserError(f"{file} cannot be read as an IDX file: {error}; fetch it again") from error


class HubImages(Images):
    """A dataset of the hub, or a local folder with the images, one subfolder per class: <path>/<folder>/<class>/*.

    Args:
        dataset, revision: as in `datasets`.
        classes: number of classes. A label is the position of the class among the sorted subfolders, as in ImageNet.
        path: a local folder instead of the hub.
        splits: for `test` and `train`, the name of the split in `datasets`, and its folder in `path`.
    """

    splits: dict[str, dict[str, str]]

    def __init__(
        self, name: str, dataset: str, revision: str, classes: int, path: str | None, splits: dict[str, dict[str, str]]
    ) -> None:
        require_integer("data.images.classes", classes, 1)
        self.name, self.dataset, self.revision, self.classes, self.splits = name, dataset, revision, classes, splits
        self.path = None if path is None else Path(path).expanduser()

    @property
    def folder(self) -> str:
        """Name of the split's folder in `path`."""
        return self.splits[self.split]["folder"]

    def items(self) -> Items:
        return self.from_hub if self.path is None else self.from_folder

    @cached_property
    def from_hub(self) -> Items:
        rows = fetched(
            self.dataset,
            setting=f"data={self.name}",
            remedy=f"accept its terms at huggingface.co/datasets/{self.dataset} and run `hf auth login`, "
            f"or give data.path=<folder with {self.folder}/<class>/*.JPEG> "
            f"(calibration={self.name} calibration.path= for training images elsewhere), or use data=digits",
            revision=self.revision,
            split=self.splits[self.split]["split"],
        )
        return Items(list(rows["label"]), lambda i: rows[i]["image"])

    @cached_property
    def from_folder(self) -> Items:
        from torchvision.datasets import ImageFolder

        assert self.path is not None
        root = self.path / self.folder
        if not root.is_dir():
            raise UserError(
                f"data.path={self.path} has no folder {self.folder}; give the folder of {self.folder}/<class>/*.JPEG"
            )
        try:
            found = ImageFolder(root)
        except FileNotFoundError as error:  # no class, or a class without an image
            raise UserError(f"{root} does not hold images as <class>/*.JPEG: {error}") from error
        if len(found.classes) != self.classes:
            raise UserError(
                f"{root} holds {len(found.classes)} classes, expected {self.classes}, for a label is a position among the "
                "sorted folders; add the others, or set data.images.classes"
            )
        return Items(found.targets, lambda i: found[i][0])

    def identity(self, cache: Cache) -> str:
        """Digest of all images of a local folder. It is cached until a file's name, size or modification time changes."""
        if self.path is None:
            return digest([self.dataset, self.revision, self.splits[self.split]])
        self.items()
        root = self.path / self.folder
        files = sorted(path for path in root.glob("*/*") if path.is_file())
        key = digest([str(root.resolve()), [[str(path.relative_to(root)), version_of(path)] for path in files]])
        known = cache.load_json("digests", key)
        if known is None:
            told = tqdm(files, f"reading {root}", unit="file", dynamic_ncols=True, delay=2)
            known = digest({str(path.relative_to(root)): file_digest(path) for path in told})
            cache.remember("digests", key, known)
        return known
