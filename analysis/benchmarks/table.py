"""The table of a benchmark as a file: lines `# name: value` of how it was made, then CSV. Those that are claimed are in git."""

import csv
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from nla.machine.errors import UserError
from nla.machine.files import write_atomically
from nla.machine.provenance import environment

IN_GIT = Path(__file__).parents[1] / "records" / "benchmarks"


@dataclass
class Table:
    """A table that was read.

    Attributes:
        made: command, commit, dirty, device, threads and torch, as text (see `origin`).
        rows: {column: cell} of each row. Cells are text as in the file.
    """

    made: dict[str, str]
    rows: list[dict[str, str]]


def origin(command: str, device: str) -> dict[str, str]:
    """How a table is made by this command, on this device, with the code and the machine as they are now."""
    known = environment(device)
    kept = {name: known[name] for name in ("commit", "dirty", "device", "threads")}
    return {"command": command} | {name: str(value) for name, value in kept.items()} | {"torch": known["packages"]["torch"]}


def head(made: dict[str, str]) -> str:
    """The lines above the CSV."""
    return "".join(f"# {name}: {value}\n" for name, value in made.items())


def write_table(frame: pd.DataFrame, made: dict[str, str], path: Path) -> None:
    """Write a table, over what is there. Floats get 4 significant digits: repetitions differ in the second or third."""
    write_atomically(path, (head(made) + frame.to_csv(index=False, float_format="%.4g")).encode())


def read_table(path: Path) -> Table:
    """A table that `write_table` wrote.

    Raises:
        UserError: the file does not say which command made it.
    """
    lines = path.read_text().splitlines()
    above = [line for line in lines if line.startswith("# ")]
    made = {name: value for name, _, value in (line[2:].partition(": ") for line in above)}
    if "command" not in made:
        raise UserError(f"{path} does not say which command made it; let the command write it: table={path.name}")
    return Table(made, list(csv.DictReader(lines[len(above) :])))


def read_tables(folder: Path = IN_GIT) -> dict[str, Table]:
    """{file name: table} of a folder."""
    return {path.name: read_table(path) for path in sorted(folder.glob("*.csv"))}
