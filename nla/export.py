"""`python -m nla.export FOLDER --to dense|pairs|pivoted OUT`: convert a compressed folder to another one.

dense    an ordinary model folder with the same matrices, in the size of the dense model
pairs    two ordinary linear layers for each compressed one, and a README with the function that loads them
pivoted  a compressed folder in which low-rank terms are stored by pivot rows (PIFA): fewer numbers, the same matrices
"""

import argparse
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from nla.machine.errors import NonFiniteError, UserError

FORMS = {
    "dense": "its terms are multiplied out, so that its linear layers are ordinary ones again.",
    "pairs": "each compressed layer is two linear layers.",
    "pivoted": "low-rank terms are stored by pivot rows where these take fewer bits.",
}
OWN_FILES = {"README.md", "config.json", "digests.json"}  # written anew


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m nla.export", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="a folder that save=FOLDER or nla.save_compressed wrote")
    parser.add_argument("--to", required=True, choices=["dense", "pairs", "pivoted"])
    parser.add_argument("out", type=Path, help="a new folder")
    parser.add_argument(
        "--multiple", type=int, default=1, help="pairs: ranks are padded with zeros to a multiple of this, such as 32"
    )
    asked = parser.parse_args(arguments)
    if asked.multiple < 1:
        parser.error(f"--multiple {asked.multiple} must be 1 or more")
    if asked.multiple > 1 and asked.to != "pairs":
        parser.error(f"--multiple {asked.multiple} is for --to pairs, not --to {asked.to}")
    export(asked.folder.expanduser(), asked.to, asked.out.expanduser().absolute(), asked.multiple)


def export(folder: Path, to: str, out: Path, multiple: int) -> None:
    """Write the new folder, and print the size of both."""
    from nla.compressed.contents import count_bits
    from nla.saved.convert import pivot, write_dense, write_pairs
    from nla.saved.load import load_compressed
    from nla.saved.save import require_new, write, write_model

    require_new(out)
    model = load_compressed(folder)
    if to == "pivoted":
        before = count_bits(model)
        for said in pivot(model):
            print(said, flush=True)
        if count_bits(model) == before:
            raise UserError(f"{out} is not written, because pivot rows would make no layer of {folder} smaller")
    writers: dict[str, Callable[[Any, Path], str | None]] = {
        "dense": write_dense,
        "pairs": lambda model, draft: write_pairs(model, draft, multiple),
        "pivoted": write_model,
    }

    def make(draft: Path, scratch: Path) -> None:
        loading = writers[to](model, draft)
        for file in sorted(folder.rglob("[!.]*")):
            name = file.relative_to(folder)
            hidden = any(part.startswith(".") for part in name.parts)  # of git or of a download
            if file.is_file() and not hidden and file.name not in OWN_FILES and ".safetensors" not in file.name:
                (draft / name).parent.mkdir(parents=True, exist_ok=True)
                if not (draft / name).exists():
                    shutil.copy(file, draft / name)
        (draft / "README.md").write_text(converted_card((folder / "README.md").read_text(), to, loading))

    write(out, make)
    print(f"{folder}: {weight_bytes(folder):,} bytes of weights\n{out}: {weight_bytes(out):,} bytes of weights")


def converted_card(text: str, to: str, loading: str | None) -> str:
    """The model card of a converted folder: the one it was made from, with a note and its own way of loading."""
    about, heading, old = text.partition("## Loading\n\n")
    note = f"This folder was converted to `{to}`: {FORMS[to]} What stands above is of the folder that it was made from.\n\n"
    if loading is None:
        return about + note + heading + old
    return about.replace("library_name: nla\n", "", 1) + note + heading + f"{loading}\n"  # nla does not load the folder


def weight_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (UserError, NonFiniteError) as error:
        sys.exit(f"error: {error}")
