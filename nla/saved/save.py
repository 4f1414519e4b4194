"""Save a compressed model as a folder: safetensors, configuration, tokeniser, model card and digests."""

import json
from pathlib import Path
from typing import Any

from torch import nn

from nla.compressed.contents import count_bits, count_parameters, matrix_terms
from nla.machine.errors import UserError
from nla.machine.sealed_folder import make_sealed
from nla.models.weights import require_finite
from nla.saved.card import IMAGES, TEXT, About, card
from nla.saved.description import describe, stored_tensors

SHARD = "5GB"  # the largest file


def save_compressed(model: nn.Module, folder: str | Path, tokenizer: Any = None, about: About | None = None) -> None:
    """Save a model with compressed layers in a new folder. The folder appears when it is whole, or not at all.

    Args:
        model: a model of transformers or timm whose layers `nla.compressed.surgery.swap` replaced, or that was loaded.
        folder: does not exist, or is empty.
        tokenizer: is saved too.
        about: the origin and the figures of the model, for the model card.

    Raises:
        UserError: the folder cannot be written, or the model is of another kind.
        NonFiniteError: a number of the model is NaN or infinite.
    """
    folder = Path(folder).expanduser().absolute()
    require_new(folder)
    if not matrix_terms(model):
        raise UserError("the model has no compressed layer, so it can be saved by its own save_pretrained")
    require_finite(model, "it is not saved")
    about = about or About(base=str(getattr(getattr(model, "config", None), "name_or_path", "") or "unknown"))

    def make(draft: Path, scratch: Path) -> None:
        write_model(model, draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        loading = TEXT if hasattr(model, "save_pretrained") else IMAGES
        (draft / "README.md").write_text(card(about, counts(model), loading))

    write(folder, make)


def require_new(folder: Path) -> None:
    """Raise UserError if the folder exists and is not empty, so that nothing is overwritten."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not an empty folder, and nothing is overwritten; name another, or delete it")


def write(folder: Path, make: Any) -> None:
    """`make_sealed` of a folder with a README.md, with a sentence instead of the system's or safetensors' errors."""
    from safetensors import SafetensorError

    def make_readable(draft: Path, scratch: Path) -> None:
        make(draft, scratch)
        for file in draft.glob("*.safetensors"):
            file.chmod((draft / "README.md").stat().st_mode)  # safetensors writes files that nobody else may read

    try:
        make_sealed(folder, make_readable)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{folder} could not be written ({error}); nothing is left of it; name a folder on another disk"
        ) from error


def counts(model: nn.Module) -> list[tuple[str, str]]:
    """Rows of the model card: number of parameters, and bytes."""
    return [("parameters", f"{count_parameters(model):,}"), ("bytes of the parameters", f"{count_bits(model) // 8:,}")]


def write_model(model: Any, folder: Path) -> None:
    """Write weights and configuration in this project's format: by the library's own function, and with the description.

    Raises:
        UserError: the model is neither of transformers nor of timm.
    """
    if hasattr(model, "save_pretrained"):
        from nla.saved.quantizer import attach

        attach(model)
        model.save_pretrained(folder, max_shard_size=SHARD)
    elif hasattr(model, "pretrained_cfg"):
        save_timm(model, folder)
    else:
        raise UserError(f"{type(model).__name__} is no model of transformers or timm, whose folders this can write")


def save_timm(model: Any, folder: Path) -> None:
    """Write a model of timm: config.json as timm writes it, with the description under `compressed`."""
    from huggingface_hub import save_torch_state_dict
    from timm.models._hub import save_config_for_hf

    description = describe(model)
    save_torch_state_dict(stored_tensors(model, description), folder, max_shard_size=SHARD)
    save_config_for_hf(model, str(folder / "config.json"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"compressed": description}, indent=1))
