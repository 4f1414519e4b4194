"""Reads the names and shapes of the weights in a folder, and its JSON files, without trust in what is there."""

import json
import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nla.machine.errors import UserError

WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
LARGEST_JSON = 50_000_000  # bytes; the largest index of published weights has a few million
TYPES = {  # of a .safetensors file
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2, "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip


class IncompleteError(UserError):
    """Files of weights are missing."""


def require_file(file: Path) -> None:
    """Raise UserError unless this is a file that can be read: not a pipe, a device, a folder or a broken link."""
    if not file.is_file():
        raise UserError(f"{file} is not a file (but a folder, a pipe, a device or a broken link); replace it")
    if not os.access(file, os.R_OK):
        raise UserError(f"{file} cannot be read: permission denied")


def read_object(file: Path) -> dict[str, Any]:
    """The JSON object in a file. Raises UserError if the file has none."""
    require_file(file)
    if file.stat().st_size > LARGEST_JSON:
        raise UserError(f"{file} has {file.stat().st_size} bytes, too many for a configuration; allowed: {LARGEST_JSON}")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{file} is not JSON ({error}); fetch or save the model again") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds no JSON object, but a {type(found).__name__}; fetch or save the model again")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The files that transformers reads the weights from. Raises UserError if there are none, or if one is missing."""
    first = next((folder / name for name in WEIGHTS if (folder / name).exists()), None)
    if first is None:
        raise IncompleteError(f"model.path={folder} holds no weights; give a folder with {' or '.join(WEIGHTS)}")
    if first.suffix != ".json":
        require_file(first)
        return [first]
    listed = read_object(first).get("weight_map")
    if not isinstance(listed, dict) or not listed or not all(isinstance(name, str) for name in listed.values()):
        raise UserError(f"{first} has no weight_map from names of tensors to names of files; fetch or save the model again")
    names = sorted(set(listed.values()))
    outside = [name for name in names if Path(name).name != name]
    if outside:
        raise UserError(f"{first} names {outside[0]}, which is not a file of this folder; fetch or save the model again")
    missing = [name for name in names if not (folder / name).exists()]
    if missing:
        count = f"{len(missing)} of the {len(names)} files that {first.name} names"
        raise IncompleteError(f"model.path={folder} lacks {count}: {', '.join(missing[:3])}; fetch or save the model again")
    return [folder / name for name in names]


def weights_by_file(folder: Path) -> dict[Path, dict[str, Tensor]]:
    """{file: {name: tensor}} of all weights of a folder, on the meta device. Raises UserError if a file cannot be read."""
    return {file: tensors_in(file) for file in weight_files(folder)}


def tensors_in(file: Path) -> dict[str, Tensor]:
    """The tensors of a file of weights, on the meta device: their shapes and types without their values."""
    try:
        return headers(file) if file.suffix == ".safetensors" else of_bin(file, "meta")
    except Exception as error:  # the errors of the two formats have nothing in common
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{file} cannot be read, it is damaged or no file of weights: {reason}; fetch it again") from error


def headers(file: Path) -> dict[str, Tensor]:
    """`tensors_in` of a .safetensors file."""
    from safetensors import safe_open

    with safe_open(file, "pt") as opened:
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
        return {name: torch.empty(s.get_shape(), dtype=TYPES[s.get_dtype()], device="meta") for name, s in slices.items()}


def of_bin(file: Path, device: str) -> dict[str, Tensor]:
    """The tensors of a .bin file. torch reads tensors only, and runs no code of the file (`weights_only`)."""
    found = torch.load(file, device, weights_only=True, mmap=zipfile.is_zipfile(file))
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError("it holds something else than names and tensors")
    return found


def stored(file: Path, name: str) -> Tensor:
    """One tensor of a file of weights."""
    from safetensors import safe_open

    if file.suffix != ".safetensors":
        return of_bin(file, "cpu")[name]
    with safe_open(file, "pt") as opened:
        return opened.get_tensor(name)
