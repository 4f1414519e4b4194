"""Folders with small models, and what damages them."""

import json
import os
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from tests.conftest import save_as_folder

Damage = Callable[[Path], object]


@cache
def model_folder(name: str) -> Path:
    """A folder with the model of conf/model/<name>.yaml."""
    return save_as_folder(name, Path(mkdtemp()))


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def damaged(tmp_path: Path, damage: Damage) -> Path:
    """A damaged folder of tiny_llama."""
    folder = tmp_path / "model"
    shutil.copytree(model_folder("tiny_llama"), folder)
    damage(folder)
    return folder


def config(**changes: Any) -> Damage:
    """config.json with other values."""

    def damage(folder: Path) -> None:
        file = folder / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return damage


def tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    """model.safetensors with other tensors: `change` alters the dictionary."""

    def damage(folder: Path) -> None:
        held = weights(folder)
        change(held)
        save_file(held, folder / "model.safetensors", {"format": "pt"})

    return damage


def holds(name: str, contents: bytes | str | Any) -> Damage:
    """A file of the folder with other contents, bytes or JSON."""
    data = contents if isinstance(contents, bytes) else json.dumps(contents).encode()
    return lambda folder: (folder / name).write_bytes(data)


def without(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names]


def cut(name: str, keep: float) -> Damage:
    """A file of which only the first part is there."""

    def damage(folder: Path) -> None:
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(keep * len(data))])

    return damage


def in_place_of(name: str, make: Callable[[Path], object]) -> Damage:
    """Something else under the name of a file."""

    def damage(folder: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        make(folder / name)

    return damage


def pipe(path: Path) -> None:
    os.mkfifo(path)


def link_loop(path: Path) -> None:
    path.symlink_to(path.name)


def both(*damages: Damage) -> Damage:
    return lambda folder: [damage(folder) for damage in damages]


def as_bin(folder: Path) -> None:
    torch.save(weights(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def shards(folder: Path) -> None:
    """The weights in two files and an index."""
    held = weights(folder)
    names = sorted(held)
    index = {name: f"model-0000{1 + (i % 2)}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(index.values()):
        save_file({name: held[name] for name in names if index[name] == file}, folder / file, {"format": "pt"})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    (folder / "model.safetensors").unlink()
