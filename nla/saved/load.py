"""Load a folder that `save_compressed` wrote."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from nla.machine.errors import UserError
from nla.machine.sealed_folder import damage
from nla.models.folder import require_buildable
from nla.models.weights import require_finite
from nla.saved.description import check_description, guard, put_empty_layers, require_tensors, share


def load_compressed(folder: str | Path, device: str = "cpu") -> nn.Module:
    """The model of a folder that `save_compressed` wrote, in evaluation mode, after its files were verified.

    Raises:
        UserError: the folder is not such a folder, a file is missing or damaged, or another version of this project wrote it.
        NonFiniteError: a number of the model is NaN or infinite.
    """
    folder = Path(folder).expanduser()
    config = read_config(folder)
    found = damage(folder)
    if found:
        raise UserError(f"{folder} is damaged or incomplete ({', '.join(found)}); copy the whole folder again")
    if "compressed" in config:
        return load_timm(folder, config["compressed"]).to(device).eval()
    require_buildable(config)
    from transformers import AutoModelForCausalLM

    model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    return model.to(device)


def read_config(folder: Path) -> dict[str, Any]:
    """The values of config.json, which describe a compressed model.

    Raises:
        UserError: they do not, or this version cannot read such a model.
    """
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text())
        description = config.get("compressed") or config.get("quantization_config") or {}
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{file} cannot be read ({error}); give a folder that save=FOLDER or save_compressed wrote") from error
    check_description(description)
    return config


def load_timm(folder: Path, description: dict[str, Any]) -> nn.Module:
    """A model of timm with its compressed layers."""
    import timm
    from safetensors.torch import load_file

    module = timm.create_model(f"local-dir:{folder}")
    put_empty_layers(module, description)
    tensors = {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
    require_tensors(module, description, tensors)
    own = {name: tensor for name, tensor in tensors.items() if name not in guard(description)}
    copies = {name: own[other] for name, other in description["shared"].items()}
    module.load_state_dict(own | copies, assign=True)
    share(module, description)
    require_finite(module, "save the model again")
    return module.to(next(module.parameters()).dtype)
