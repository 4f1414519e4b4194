"""Image classifiers of timm, with weights from the hub or a local file."""

import json
import logging
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nla.machine.cache import Cache, digest
from nla.machine.errors import UserError
from nla.models.base import DTYPES, ModelSource, VisionModel
from nla.models.causal_lm import disk_refusal, hub_refusal
from nla.models.files import require_file
from nla.models.weights import require_fit, require_numbers

log = logging.getLogger(__name__)

WEIGHTS = (".safetensors", ".pth", ".pt", ".bin")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")


class ImageClassifier(ModelSource):
    """A source of one image classifier. Its configuration is timm's name under `model`, and arguments of create_model."""

    reads = "images"

    def empty(self, configuration: dict[str, Any]) -> tuple[nn.Module, int]:
        with torch.device("meta"):
            module = from_architecture(configuration)
        return module, module.num_classes


def from_architecture(architecture: dict[str, Any], weights_seed: int = 0) -> Any:
    """A timm model on torch's default device, with random weights from `weights_seed`."""
    import timm

    settings = {key: value for key, value in architecture.items() if key != "model"}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(weights_seed)
        return timm.create_model(architecture["model"], **settings)


def classifier(module: nn.Module, device: str, dtype: str) -> VisionModel:
    """The model in evaluation mode on `device`, with timm's evaluation transform for it."""
    from timm.data import create_transform, resolve_model_data_config

    settings = resolve_model_data_config(module)
    channels = settings["input_size"][0]
    evaluation = create_transform(**settings, is_training=False)

    def transform(image: Any) -> Tensor:
        return evaluation(image.convert("RGB" if channels == 3 else "L")).to(DTYPES[dtype])

    return VisionModel(module.to(device, DTYPES[dtype]).eval(), transform)


class TimmModel(ImageClassifier):
    """A model of timm with the weights that timm publishes, or with those of a local file.

    Args:
        name: hub name of the weights. If the hub's local cache has them, nothing is downloaded. With `path` it only names the
            model.
        path: a .safetensors or .pth file, or a folder with one, instead of the hub.
        dtype: the run's default type, which the configuration reads; not used here.
        architecture: timm's name and tag of the weights under `model`, and arguments of timm.create_model. If `model` is None,
            both are read from the config.json beside the weights; arguments that are not None replace those of the file.
        licence: the licence that the user must have accepted, for messages.
    """

    def __init__(self, name: str | None, path: str | None, dtype: str, architecture: dict[str, Any], licence: str = "") -> None:
        self.name, self.licence = name or "", licence
        self.path = None if path is None else Path(path).expanduser()
        self.architecture = dict(architecture)

    def configuration(self, cache: Cache) -> dict[str, Any]:
        if self.architecture["model"] is not None:
            return self.architecture
        if self.path is None:
            raise UserError(
                "model.path is missing; give model.path=<folder that timm's save_for_hf wrote, with config.json and "
                "model.safetensors, or a file with weights>"
            )
        given = {key: value for key, value in self.architecture.items() if value is not None}
        return read_architecture(weights_file(self.path).with_name("config.json")) | given

    def inspect(self, cache: Cache) -> None:
        file = self.downloaded() if self.path is None else weights_file(self.path)
        if file is not None:
            fitting(file, read_weights(file), self.empty(self.configuration(cache))[0])

    def identity(self, cache: Cache) -> str:
        if self.path is None:
            return ""
        return digest([cache.file_digest(weights_file(self.path)), self.configuration(cache)])

    def check(self, dtype: str, cache: Cache) -> None:
        if self.path is not None or self.downloaded():
            return
        size = self.inventory(cache).parameters * 4 / 1e9  # published in fp32
        memory = size * DTYPES[dtype].itemsize / 4
        lack = hub_refusal(self.name, "main") or disk_refusal(size)
        if lack:
            raise UserError(
                f"model {self.name} needs model.path=<.safetensors or .pth file with timm's weights>, or the network to fetch "
                f"it ({size:.1f} GB of disk, {memory:.1f} GB of memory in {dtype}; licence: {self.licence}); {lack}"
            )
        log.info("fetching %s (%.1f GB, licence: %s)", self.name, size, self.licence)

    def downloaded(self) -> Path | None:
        """The file of the weights in the hub's cache on this machine, if it is there."""
        from huggingface_hub import try_to_load_from_cache

        found = (try_to_load_from_cache(self.name, file) for file in HUB_FILES)
        return next((Path(path) for path in found if isinstance(path, str)), None)

    def fetched(self) -> Path:
        """The file of the weights, from the hub or its cache."""
        from huggingface_hub import hf_hub_download, list_repo_files

        there = list_repo_files(self.name)
        return Path(hf_hub_download(self.name, next(file for file in HUB_FILES if file in there)))

    def load(self, device: str, dtype: str, cache: Cache) -> VisionModel:
        module = from_architecture(self.configuration(cache))
        load_weights(module, weights_file(self.path) if self.path is not None else self.downloaded() or self.fetched())
        return classifier(module, device, dtype)


def read_architecture(file: Path) -> dict[str, Any]:
    """timm's name of a model under `model`, and arguments of timm.create_model, from a config.json that timm wrote.

    Raises:
        UserError: the file does not exist, or timm did not write it.
    """
    if not os.path.lexists(file):
        raise UserError(
            f"{file} does not exist; give model.architecture.model=<timm's name of the model> and "
            "model.architecture.num_classes=<number of classes>"
        )
    require_file(file)
    try:
        config = json.loads(file.read_text())
        preparation = config["pretrained_cfg"] | {"num_classes": config["num_classes"]}  # of images, and classes
        return config.get("model_args", {}) | {"model": config["architecture"], "pretrained_cfg": preparation}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"{file} is not as timm's save_for_hf writes it, with architecture, num_classes and pretrained_cfg ({error!r}); "
            "model=causal_lm reads folders of transformers"
        ) from error


def weights_file(path: Path) -> Path:
    """The file itself or, for a folder, the only weights file in it. Files of the first suffix in WEIGHTS come first.

    Raises:
        UserError: the path does not exist, or the folder has no or several such files.
    """
    if path.is_file():
        return path
    if not path.is_dir():
        raise UserError(f"model.path={path} is not a file or folder; give a .safetensors or .pth file, or a folder with one")
    for suffix in WEIGHTS:
        found = sorted(path.glob(f"*{suffix}"))
        if len(found) == 1:
            require_file(found[0])
            return found[0]
        if found:
            raise UserError(f"model.path={path} holds {len(found)} files *{suffix}; name the one to load")
    raise UserError(f"model.path={path} holds no weights; give a folder with a .safetensors or .pth file")


def read_weights(file: Path) -> dict[str, Tensor]:
    """{name: tensor} from the top level of a file, or from its entry `model` or `state_dict`. No pickled code is run.

    Raises:
        UserError: the file cannot be read, or holds other things than named tensors.
    """
    from safetensors.torch import load_file

    try:
        found = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except Exception as error:  # the errors of the two formats have nothing in common
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} cannot be read as .safetensors, or as .pth with weights only: {reason}") from error
    weights = found
    if isinstance(found, dict):
        weights = next((found[key] for key in ("model", "state_dict") if key in found), found)
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise UserError(f"{file} holds something else than the names and tensors of a model; give a file with its state dict")
    return weights


def load_weights(module: nn.Module, file: Path) -> None:
    """Load all weights of the model from the file, in place.

    Raises:
        UserError: the file lacks a weight, or has an unknown one or one of another shape; it counts and names them.
    """
    module.load_state_dict(fitting(file, read_weights(file), module))


def fitting(file: Path, weights: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """The weights under the names of this module. Raises UserError if they do not fit (see `load_weights`)."""
    wanted = module.state_dict()
    if weights.keys() != wanted.keys():
        weights = renamed(weights, module)
    require_numbers(str(file), weights)
    require_fit(
        str(file),
        [name for name in wanted if name not in weights],
        [name for name in weights if name not in wanted],
        [(n, weights[n].shape, t.shape) for n, t in wanted.items() if n in weights and weights[n].shape != t.shape],
        "set model.architecture to what they were made from",
    )
    return weights


def renamed(weights: dict[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    """Weights with the names of the original publication, under timm's names. Tensors that timm would resize stay unchanged."""
    rename = getattr(sys.modules[type(module).__module__], "checkpoint_filter_fn", None)
    if rename is None:
        return weights
    tensors = {id(value) for value in weights.values()}
    try:
        found = rename(weights, module)
    except (KeyError, RuntimeError, AttributeError, ValueError):  # not weights of this architecture
        return weights
    return {name: value if id(value) in tensors else weights.get(name, value) for name, value in found.items()}
