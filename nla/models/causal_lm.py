"""Causal language models from the hub or a local folder."""

import json
import logging
import shutil
from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import nn

from nla.machine.cache import Cache, digest
from nla.machine.errors import UserError
from nla.models.base import DTYPES, LanguageModel, ModelSource

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
        return model, model.config.max_position_embeddings


def from_architecture(architecture: dict[str, Any]) -> Any:
    """A transformers model with random weights, on torch's default device (see `torch.device` as a context)."""
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in architecture.items() if key != "model_type"}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture["model_type"], **settings))


def load_pretrained(
    source: str, device: str, dtype: str, device_map: str | None = None, revision: str = "main"
) -> LanguageModel:
    """A model in evaluation mode and its tokeniser, from a local folder or the hub name `source`."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(
        source, revision=revision, dtype=DTYPES[dtype], device_map=device_map, trust_remote_code=False
    )
    tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, trust_remote_code=False)
    if device_map is None:
        model.to(torch.device(device))  # type: ignore[arg-type]
    return LanguageModel(model.eval(), tokenizer)


class HubModel(CausalLM):
    """A model of the Hugging Face hub, or of a local folder with the same files.

    Args:
        name: hub name. If the hub's local cache has the model, nothing is downloaded.
        revision: branch, tag or commit on the hub.
        path: a folder with config.json, weights and tokeniser, instead of the hub.
        device_map: as in transformers; null puts the whole model on `device`.
        licence: the licence that the user must have accepted, for messages.
        dtype: the run's default type, which the configuration reads; not used here.
        architecture: the transformers configuration. With it, a plan needs neither weights nor network.
    """

    def __init__(
        self,
        name: str,
        revision: str,
        path: str | None,
        device_map: str | None,
        licence: str,
        dtype: str,
        architecture: dict[str, Any],
    ) -> None:
        self.name, self.revision, self.device_map, self.licence = name, revision, device_map, licence
        self.path = None if path is None else Path(path).expanduser()
        self.architecture = dict(architecture)

    def configuration(self, cache: Cache) -> dict[str, Any]:
        if self.path is None:
            return self.architecture
        file = self.path / "config.json"
        if not file.is_file():
            state = "has no config.json" if self.path.is_dir() else "is not a folder"
            raise UserError(
                f"model.path={self.path} {state}; give a folder that save_pretrained wrote, "
                "with config.json, *.safetensors and the tokeniser"
            )
        configuration = json.loads(file.read_text())
        if (configuration.get("quantization_config") or {}).get("quant_method") == "nla":
            raise UserError(
                f"model.path={self.path} is a compressed model; a dense one is needed, which "
                f"`python -m nla.export {self.path} --to dense OUT` writes"
            )
        return configuration

    def identity(self, cache: Cache) -> str:
        if self.path is None:
            return ""
        files = sorted(p for p in self.path.iterdir() if p.suffix in {".json", ".safetensors", ".bin", ".model"})
        return digest({p.name: cache.file_digest(p) for p in files})

    def check(self, dtype: str, cache: Cache) -> None:
        if self.path is not None:
            if not any(self.path.glob("*.safetensors")) and not any(self.path.glob("*.bin")):
                raise UserError(f"model.path={self.path} holds no weights (*.safetensors)")
            return
        if self.is_downloaded():
            return
        size = self.inventory(cache).parameters * DTYPES[dtype].itemsize / 1e9
        lack = hub_refusal(self.name, self.revision) or disk_refusal(size)
        if lack:
            raise UserError(
                f"model {self.name} needs model.path=<folder with config.json, *.safetensors and tokeniser>, or the network "
                f"to fetch it ({size:.1f} GB of disk, {size:.1f} GB of memory in {dtype}; licence: {self.licence}); {lack}"
            )
        log.info("fetching %s (%.1f GB, licence: %s)", self.name, size, self.licence)

    def is_downloaded(self) -> bool:
        """Whether the hub's cache on this machine has the model's weights."""
        from huggingface_hub import try_to_load_from_cache

        names = [f"{stem}{end}" for stem in ("model.safetensors", "pytorch_model.bin") for end in ("", ".index.json")]
        return any(isinstance(try_to_load_from_cache(self.name, n, revision=self.revision), str) for n in names)

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
