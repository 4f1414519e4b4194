"""Inspects a folder with a transformers model before it is loaded: its configuration, its tensors, its tokeniser."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nla.machine.errors import UserError
from nla.models.files import read_object, require_file, stored, weights_by_file
from nla.models.weights import require_fit, require_numbers

MOST_LAYERS = 10_000
# names that the weights lack, names that the model lacks, and (name, shape in the file, shape in the model)
Misfits = tuple[list[str], list[str], list[tuple[str, torch.Size, torch.Size]]]
FOREIGN = {  # what config.json may not have, and what to do about it
    "quantization_config": "the weights are quantised, in a format that is not read here; give the model in full precision",
    "transformers_weights": "the weights would be read from another file; give a folder with model.safetensors",
    "fusion_config": "layers would be replaced by others; remove it",
}


def read_config(folder: Path) -> dict[str, Any]:
    """The contents of config.json.

    Raises:
        UserError: it is missing, is not a JSON object, or asks for other weights or for code from the hub.
    """
    if not folder.is_dir():
        raise UserError(f"model.path={folder} is not a folder; give a folder that save_pretrained wrote")
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"model.path={folder} has an adapter_config.json: an adapter is only a change to a model; "
            "merge it into its model (peft: merge_and_unload) and save that"
        )
    if not os.path.lexists(folder / "config.json"):
        raise UserError(
            f"model.path={folder} has no config.json; give a folder that save_pretrained wrote, "
            "with config.json, *.safetensors and the tokeniser"
        )
    config = read_object(folder / "config.json")
    quantised = config.get("quantization_config")
    if isinstance(quantised, dict) and quantised.get("quant_method") == "nla":
        raise UserError(
            f"model.path={folder} is a compressed model; a dense one is needed, which "
            f"`python -m nla.export {folder} --to dense OUT` writes"
        )
    for key, why in FOREIGN.items():
        if config.get(key) is not None:
            raise UserError(f"{folder / 'config.json'} has {key}: {why}")
    return config


def require_buildable(config: dict[str, Any]) -> None:
    """Raise UserError if this is no causal language model, or if building it would run code from the hub or take hours."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    kind = config.get("model_type")
    if kind not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise UserError(f"the model's configuration has model_type={kind}, which is no causal language model of transformers")
    for key, value in items(config):
        if key.endswith("_implementation") and "/" in str(value):
            raise UserError(f"{key}={value} would fetch code from the hub, which is not run; remove it or use sdpa or eager")
        if "layer" in key and isinstance(value, int) and value > MOST_LAYERS:
            raise UserError(f"the model's configuration has {key}={value}; allowed: at most {MOST_LAYERS}")
        if isinstance(value, float) and not abs(value) < float("inf"):
            raise UserError(f"the model's configuration has {key}={value}, which is not a finite number")


def items(config: Any) -> Iterator[tuple[str, Any]]:
    """All keys and values of a configuration, at any depth."""
    if isinstance(config, dict):
        for key, value in config.items():
            yield str(key), value
            yield from items(value)


def inspect_folder(folder: Path, module: nn.Module) -> None:
    """Raise UserError, with one sentence, if the folder's files cannot be loaded as this model.

    Only names, types and shapes of the weights are read, and the values of two weights that should be one.

    Args:
        module: the model that config.json describes, on the meta device.
    """
    for file in sorted(folder.iterdir()):
        if not file.is_dir():
            require_file(file)
    held = weights_by_file(folder)
    tensors = {name: tensor for found in held.values() for name, tensor in found.items()}
    require_numbers(str(folder), tensors)
    require_fit(str(folder), *misfits(module, tensors))
    require_tied(folder, module.all_tied_weights_keys, {name: file for file, found in held.items() for name in found})  # type: ignore[arg-type]
    if (folder / "generation_config.json").exists():
        read_object(folder / "generation_config.json")
    inspect_tokenizer(folder, module.get_input_embeddings().num_embeddings)  # type: ignore[operator]


def require_tied(folder: Path, tied: dict[str, str], files: dict[str, Path]) -> None:
    """Raise UserError if two weights that the model has as one are both stored, and differ.

    Args:
        tied: {name: name of the weight that it is the same as}.
        files: {name: the file that the weight is stored in}.
    """
    for one, other in tied.items():
        if one in files and other in files and not torch.equal(stored(files[one], one), stored(files[other], other)):
            raise UserError(
                f"the weights in {folder} have {one} and {other} with different values, which are one in config.json; "
                "set tie_word_embeddings to false in it, or give other weights"
            )


def misfits(module: nn.Module, tensors: dict[str, Tensor]) -> Misfits:
    """Where the tensors do not fit the model, found by loading them on the meta device: without values, in a second.

    So transformers' own rules hold: prefixes of base models, tied weights, renamed tensors and left-over buffers.
    """
    from transformers.utils import logging

    level = logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity(logging.CRITICAL)  # what it reports is said in the error
    logging.disable_progress_bar()
    try:
        _, found = type(module).from_pretrained(  # type: ignore[attr-defined]
            None,
            config=module.config,
            state_dict=tensors,
            device_map={"": "meta"},
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()
    return faults(found)


def faults(found: dict[str, Any]) -> Misfits:
    """The misfits in what transformers reports about a loading."""
    return sorted(found["missing_keys"]), sorted(found["unexpected_keys"]), sorted(found["mismatched_keys"])


def inspect_tokenizer(folder: Path, vocabulary: int) -> None:
    """Raise UserError if the folder has no tokeniser, or one with ids that the model's embedding does not have."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)
        padding = tokenizer.pad_token_id  # often added to the vocabulary, and never in a text
        largest = max((i for i in tokenizer.get_vocab().values() if i != padding), default=0)
        mute = not tokenizer("a text")["input_ids"]  # transformers makes an empty tokeniser if the files are missing
    except Exception as error:  # transformers and tokenizers raise what they like
        reason = (str(error).splitlines() or [""])[0] or repr(error)
        raise UserError(
            f"the tokeniser in {folder} cannot be read: {reason}; add the files of the model's tokeniser"
        ) from error
    if mute:
        raise UserError(f"the tokeniser in {folder} finds no token in a text; add the model's tokeniser")
    if largest >= vocabulary:
        raise UserError(
            f"the tokeniser in {folder} has ids up to {largest}, but the model's vocabulary has {vocabulary}; "
            "give the model and the tokeniser that belong together"
        )
