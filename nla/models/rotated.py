"""Another source's model in a random basis of its residual stream: the same function, see nla/models/rotation.py."""

import logging
from pathlib import Path
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from nla.machine.cache import Cache, digest
from nla.machine.errors import UserError, require_integer
from nla.machine.provenance import code_digest, computing_packages
from nla.machine.sealed_folder import sealed_folder
from nla.models.base import LanguageModel, ModelSource
from nla.models.causal_lm import CausalLM, load_pretrained
from nla.models.rotation import ROTATABLE, random_basis, rotate

log = logging.getLogger(__name__)


class RotatedModel(CausalLM):
    """A rotated model. It is computed once, in fp32 on the CPU, and kept in the cache.

    Args:
        name, licence: for readers of the configuration; not used here.
        rotation_seed: the seed of the basis.
        dtype: the run's default type, which the configuration reads; not used here.
        of: the settings of the model that is rotated, as of conf/model. The copy in the cache is made again if they change, or
            the data or files that they name, but not if the code that loads the model does.
    """

    def __init__(self, name: str, rotation_seed: int, licence: str, dtype: str, of: dict[str, Any]) -> None:
        require_integer("model.rotation_seed", rotation_seed, 0)
        self.rotation_seed, self.settings, self.of = rotation_seed, of, source_of(of)

    def configuration(self, cache: Cache) -> dict[str, Any]:
        """That of the model that is rotated, with a head of its own. Raises UserError if it has other norms than RMSNorm."""
        found = self.of.configuration(cache)
        kind = found.get("model_type")
        if kind not in ROTATABLE:
            raise UserError(
                f"a model of model_type={kind} cannot be rotated, because its norms or layers differ from LLaMA's; "
                f"allowed: {', '.join(ROTATABLE)}; choose one of these, as in model@model.of=tiny_llama"
            )
        return found | {"tie_word_embeddings": False}

    def identity(self, cache: Cache) -> str:
        return self.of.identity(cache)

    def inspect(self, cache: Cache) -> None:
        self.of.inspect(cache)

    def check(self, dtype: str, cache: Cache) -> None:
        self.of.check("float32", cache)

    def load(self, device: str, dtype: str, cache: Cache) -> LanguageModel:
        return load_pretrained(str(self.folder(cache)), device, dtype)

    def folder(self, cache: Cache) -> Path:
        """Folder with the rotated model and its tokeniser. The first call computes it."""
        made_from = {
            "of": self.settings,
            "identity": self.of.identity(cache),
            "seed": self.rotation_seed,
            "code": code_digest("nla.models.rotation"),
            "packages": computing_packages(),
        }

        def make(folder: Path, scratch: Path) -> None:
            log.info("rotating the residual stream, once (half a minute for 135 M parameters)")
            model: Any = self.of.load("cpu", "float32", cache)
            rotate(model.module, random_basis(model.module.config.hidden_size, self.rotation_seed))
            model.module.save_pretrained(folder)
            model.tokenizer.save_pretrained(folder)

        return sealed_folder(cache, "models", f"rotated-{digest(made_from)[:16]}", make)


def source_of(settings: dict[str, Any]) -> ModelSource:
    """The source with these settings. Raises UserError if they are none of a model, or are wrong."""
    if not isinstance(settings, dict) or "_target_" not in settings:
        raise UserError(f"model.of={settings} is not the settings of a model; choose one as in model@model.of=tiny_llama")
    try:
        source: ModelSource = instantiate(settings, _convert_="all")
    except InstantiationException as error:
        if isinstance(error.__cause__, UserError):
            raise error.__cause__ from None
        raise
    return source
