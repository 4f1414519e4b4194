"""Makes transformers load and save compressed models: `import nla` registers this as the storage format `nla`."""

import re
from typing import Any

import torch
from safetensors import safe_open
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from nla.compressed.contents import compressed_layers
from nla.compressed.surgery import merge
from nla.machine.errors import UserError
from nla.models.weights import require_finite
from nla.saved.description import (
    METHOD,
    check_description,
    describe,
    guard,
    put_empty_layers,
    require_tensors,
    share,
    stored_tensors,
)


@register_quantization_config(METHOD)
class CompressedConfig(QuantizationConfigMixin):
    """A description (see `nla.saved.description`) as the `quantization_config` of a transformers configuration."""

    def __init__(self, **description: Any) -> None:
        check_description(description)
        self.__dict__.update(description)


@register_quantizer(METHOD)
class CompressedQuantizer(HfQuantizer):
    """Puts empty compressed layers into the architecture before transformers loads the weights, and checks them after it."""

    requires_calibration = True  # a dense folder cannot be compressed by loading it
    quantization_config: CompressedConfig

    def _process_model_before_weight_loading(self, model: Any, checkpoint_files: Any = None, **kwargs: Any) -> Any:
        saved, asked = model.config.architectures or [], type(model).__name__
        if saved and asked not in saved:
            raise UserError(f"the folder holds a {saved[0]}, not a {asked}; load it with AutoModelForCausalLM")
        description = vars(self.quantization_config)
        put_empty_layers(model, description)
        require_tensors(model, description, names_in(checkpoint_files or []))
        model._keys_to_ignore_on_load_unexpected.update(f"^{re.escape(name)}$" for name in guard(description))
        model._keys_to_ignore_on_load_missing.update(f"^{re.escape(name)}$" for name in description["shared"])
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        share(model, vars(self.quantization_config))
        for layer in compressed_layers(model).values():  # the caller may ask for another type than that of the folder
            for p in layer.term.parameters():
                p.data = p.data.to(model.dtype)
        require_finite(model, "save the model again")
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        merge(model)
        return model

    def get_state_dict_and_metadata(self, model: Any) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """What save_pretrained writes. The description is that of the model as it is now."""
        attach(model)
        return stored_tensors(model, vars(model.config.quantization_config)), {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        return True


def attach(model: Any) -> None:
    """Tell a transformers model that it is stored in this format, so that its save_pretrained writes it."""
    config = CompressedConfig(**describe(model))
    model.config.quantization_config = config
    model.hf_quantizer = CompressedQuantizer(config)
    model.is_quantized = True


def names_in(files: list[str]) -> list[str]:
    """Names of the tensors in safetensors files."""
    names: list[str] = []
    for path in files:
        with safe_open(path, "pt") as file:
            names += file.keys()
    return names
