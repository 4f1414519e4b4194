"""Causal language models from the hub or a local folder."""

import logging
import shutil
import sys
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nla.machine.cache import Cache, digest
from nla.machine.errors import UserError
from nla.models.base import DTYPES, LanguageModel, ModelSource
from nla.models.files import IncompleteError, weight_files
from nla.models.folder import faults, inspect_folder, read_config, require_buildable
from nla.models.weights import require_fit

log = logging.getLogger(__name__)


class CausalLM(ModelSource):
    """A source of one causal language model. Its configuration is that of transformers, with `model_type`."""

    reads = "text"

    @abstractmethod
    def load(self, device: str, dtype: str, cache: Cache) -> LanguageModel:
        """The model with its weights and its tokeniser."""

    def empty(self, configuration: dict[str, Any]) -> tuple[nn.Module, int]:
        with torch.device("meta"):
            model = from_architecture(configuration)
        # models without position embeddings, such as BLOOM and Mamba, read texts of any length
        return model, getattr(model.config, "max_position_embeddings", sys.maxsize)


def from_architecture(architecture: dict[str, Any]) -> Any:
    """A transformers model with random weights, on torch's default device (see `torch.device` as a context)."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_config(configuration_of(architecture))


def configuration_of(architecture: dict[str, Any]) -> Any:
    """The transformers configuration with these values. Raises UserError if building its model is not safe."""
    from transformers import AutoConfig

    require_buildable(architecture)
    settings = {key: value for key, value in architecture.items() if key != "model_type"}
    return AutoConfig.for_model(architecture["model_type"], **settings)


def require_described(folder: Path, architecture: dict[str, Any]) -> None:
    """Raise UserError if the folder's config.json differs from the settings `model.architecture`, which are in the record.

    A model of another size would get the name of this one.
    """
    asked, found = configuration_of(architecture), configuration_of(read_config(folder))
    for key in architecture:
        here, there = getattr(asked, key), getattr(found, key, None)
        if here != there:
            raise UserError(
                f"model.architecture.{key}={here}, but the weights in {folder} were made with {key}={there}; "
                f"give other weights, or take these as they are: model=causal_lm model.path={folder}"
            )


def load_pretrained(
    source: str, device: str, dtype: str, device_map: str | None = None, revision: str = "main"
) -> LanguageModel:
    """A model in evaluation mode and its tokeniser, from a local folder or the hub name `source`.

    Raises:
        UserError: the weights lack tensors of the model, which transformers would fill with random numbers, or have others.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    loaded: Any = AutoModelForCausalLM.from_pretrained(
        source,
        revision=revision,
        dtype=DTYPES[dtype],
        device_map=device_map,
        trust_remote_code=False,
        ignore_mismatched_sizes=True,  # they are an error here
        output_loading_info=True,
    )
    model, found = loaded
    require_fit(source, *faults(found))
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    if device_map is None:
        model.to(torch.device(device))  # type: ignore[arg-type]
    elif any(p.is_meta for p in model.parameters()):
        raise UserError(
            f"{source} does not fit on the GPUs that model.device_map={device_map} uses; use more of them, or "
            "model.device_map=null device=cpu"
        )
    return LanguageModel(model.eval(), tokenizer)


class HubModel(CausalLM):
    """A model of the Hugging Face hub, or of a local folder with the same files.

    Args:
        name: hub name. If the hub's local cache has the model, nothing is downloaded. With `path` it only names the model.
        path: a folder with config.json, weights and tokeniser, instead of the hub.
        device_map: as in transformers; null puts the whole model on `device`.
        dtype: the run's default type, which the configuration reads; not used here.
        architecture: the transformers configuration. With it, a plan needs neither weights nor network. A model without one is
            read from `path`.
        revision: branch, tag or commit on the hub.
        licence: the licence that the user must have accepted, for messages.
    """

    def __init__(
        self,
        name: str | None,
        path: str | None,
        device_map: str | None,
        dtype: str,
        architecture: dict[str, Any] | None = None,
        revision: str = "main",
        licence: str = "",
    ) -> None:
        self.name, self.revision, self.device_map, self.licence = name or "", revision, device_map, licence
        self.path = None if path is None else Path(path).expanduser()
        self.architecture = architecture

    def configuration(self, cache: Cache) -> dict[str, Any]:
        if self.path is not None:
            return read_config(self.path)
        if self.architecture is None:
            raise UserError(
                "model.path is missing; give model.path=<folder that save_pretrained wrote, with config.json, "
                "*.safetensors and the tokeniser>"
            )
        return self.architecture

    def identity(self, cache: Cache) -> str:
        if self.path is None:
            return ""
        files = sorted(
            p for p in self.path.iterdir() if p.suffix in {".json", ".safetensors", ".bin", ".model", ".txt", ".jinja"}
        )
        return digest({p.name: cache.file_digest(p) for p in files})

    def inspect(self, cache: Cache) -> None:
        folder = self.path or self.downloaded()
        if folder is not None:
            require_described(folder, self.architecture or self.configuration(cache))
            inspect_folder(folder, self.empty(self.configuration(cache))[0])

    def check(self, dtype: str, cache: Cache) -> None:
        if self.path is not None or self.downloaded():
            return
        size = self.inventory(cache).parameters * DTYPES[dtype].itemsize / 1e9
        lack = hub_refusal(self.name, self.revision) or disk_refusal(size)
        if lack:
            raise UserError(
                f"model {self.name} needs model.path=<folder with config.json, *.safetensors and tokeniser>, or the network "
                f"to fetch it ({size:.1f} GB of disk, {size:.1f} GB of memory in {dtype}; licence: {self.licence}); {lack}"
            )
        log.info("fetching %s (%.1f GB, licence: %s)", self.name, size, self.licence)

    def downloaded(self) -> Path | None:
        """The folder of the model in the hub's cache on this machine, or None if files of weights are missing."""
        from huggingface_hub import try_to_load_from_cache

        config = try_to_load_from_cache(self.name, "config.json", revision=self.revision)
        if not isinstance(config, str):
            return None
        try:
            weight_files(Path(config).parent)
        except IncompleteError:
            return None
        return Path(config).parent

    def load(self, device: str, dtype: str, cache: Cache) -> LanguageModel:
        return load_pretrained(str(self.path or self.name), device, dtype, self.device_map, self.revision)


def hub_refusal(name: str, revision: str) -> str:
    """The reason why the hub does not provide this model, or "" if it does. Waits for the hub for 2 seconds at most."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json", revision=revision), timeout=2)
    except GatedRepoError:
        return f"the hub asks you to accept the licence at huggingface.co/{name} and to run `hf auth login`"
    except RepositoryNotFoundError:
        return "the hub has no model of this name, or asks you to run `hf auth login`"
    except RevisionNotFoundError:
        return f"the hub has no model.revision={revision}"
    except Exception as error:  # the client's transport errors are not part of its interface
        log.debug("hub: %r", error)
        return "the hub does not answer"
    return ""


def disk_refusal(gigabytes: float) -> str:
    """The reason why the hub's local cache cannot hold so many gigabytes, or "" if it can."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HOME)
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free / 1e9
    return "" if free > gigabytes else f"only {free:.0f} GB of disk are free in {folder}"
