"""`python -m analysis.benchmarks.load_time DENSE FOLDER [FOLDER ...]`: seconds of loading folders, and their ratio per byte.

Each loading happens in a process of its own, after the imports, and the folders take turns. transformers maps a file into
memory without reading it. So `seconds` are those of from_pretrained, in which a compressed folder's numbers are read once,
because NaN is refused, and `and_read` are those until every number was read, as the first forward pass does. The files are
expected to be in the system's cache of files, as they are after the first loading, which is not counted.

`load_compressed` is measured too, for folders that this project wrote: it verifies the digests of all files first.
"""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
from safetensors import safe_open

from nla.machine.errors import UserError
from nla.machine.timing import quartiles
from nla.saved.load import read_config

ROUNDS = 5
TIMED = """
import sys, time
import nla, torch, transformers.core_model_loading
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
name, folder = sys.argv[1:]
MODEL_FOR_CAUSAL_LM_MAPPING[type(AutoConfig.from_pretrained(folder))]  # imports the architecture
load = {"from_pretrained": AutoModelForCausalLM.from_pretrained, "load_compressed": nla.load_compressed}[name]
begun = time.perf_counter()
model = load(folder)
loaded = time.perf_counter()
for tensor in model.parameters():
    tensor.detach().sum()
print(loaded - begun, time.perf_counter() - begun)
"""


def load_time(folders: list[Path], rounds: int = ROUNDS) -> pd.DataFrame:
    """A row per folder and function that loads it. The first folder is that to which the others are compared.

    Columns: mb (10^6 bytes) and tensors (of its safetensors files), seconds (median) with q25 and q75, and_read (median), and
    per_byte (the median seconds per byte, relative to those of the first row).
    """
    cases = [(name, folder) for folder in folders for name in functions(folder)]
    times: dict[tuple[str, Path], list[list[float]]] = {case: [] for case in cases}
    for _ in range(rounds + 1):
        for name, folder in cases:
            times[name, folder].append(one(name, folder))
    rows: list[dict[str, Any]] = []
    for (name, folder), found in times.items():
        loaded, read = (quartiles(seconds) for seconds in zip(*found[1:], strict=True))
        low, middle, high = loaded
        files = sorted(folder.glob("*.safetensors"))
        size = sum(file.stat().st_size for file in files) / 1e6
        row = {"folder": folder.name, "function": name, "mb": size, "tensors": sum(map(tensors, files)), "seconds": middle}
        rows.append(row | {"q25": low, "q75": high, "and_read": read[1]})
    table = pd.DataFrame(rows)
    per_byte = table.seconds / table.mb
    return table.assign(per_byte=per_byte / per_byte[0])


def functions(folder: Path) -> list[str]:
    """The functions that load this folder."""
    try:
        read_config(folder)
    except UserError:
        return ["from_pretrained"]
    return ["from_pretrained", "load_compressed"]


def one(name: str, folder: Path) -> list[float]:
    """Seconds of loading, and of loading and reading, in a process of its own."""
    result = subprocess.run([sys.executable, "-c", TIMED, name, str(folder)], capture_output=True, text=True)
    if result.returncode:
        raise UserError(f"{folder} cannot be loaded: {result.stderr.strip().splitlines()[-1]}")
    return [float(seconds) for seconds in result.stdout.split()]


def tensors(file: Path) -> int:
    """How many tensors a safetensors file has."""
    with safe_open(file, "pt") as opened:
        return len(opened.keys())


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    try:
        table = load_time([Path(argument) for argument in sys.argv[1:]])
    except UserError as error:
        sys.exit(str(error))
    print(table.round({"mb": 0, "seconds": 3, "q25": 3, "q75": 3, "and_read": 3, "per_byte": 2}).to_string(index=False))
