"""The command line of a benchmark that prints a table: arguments `name=value`, among them `table=FILE.csv` to write it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.benchmarks.table import head, origin, write_table
from nla.machine.errors import UserError


def csv_file(text: str) -> Path:
    if not text.endswith(".csv"):
        raise ValueError
    return Path(text)


READERS: dict[str, Callable[[str], Any]] = {
    "ratio": float, "m": int, "n": int, "tokens": int, "rounds": int, "seconds": float, "kernel": str, "dtype": str,
    "steps": int, "scale": float, "blocks": int,
    "table": csv_file,
}  # fmt: skip


def given(arguments: list[str], *names: str) -> dict[str, Any]:
    """{name: value} of the arguments of a command line.

    Args:
        names: of the READERS, the arguments that this benchmark has; each has `table` too.

    Raises:
        UserError: an argument is unknown, or has a wrong value.
    """
    readers = {name: READERS[name] for name in (*names, "table")}
    values: dict[str, Any] = {}
    for argument in arguments:
        name, _, value = argument.partition("=")
        try:
            values[name] = readers[name](value)
        except (KeyError, ValueError) as error:
            known = ", ".join(f"{key}=" for key in readers)
            raise UserError(f"{argument} is not allowed; give {known}FILE.csv") from error
    if not 0 < values.get("ratio", 0.7) < 1:
        raise UserError(f"ratio={values['ratio']} must be between 0 and 1: the removed fraction of the parameters")
    if ("m" in values) != ("n" in values):
        raise UserError("m= and n= must be given together: rows and columns of the matrix")
    if min(values.get(name, 1) for name in ("m", "n", "tokens", "rounds")) < 1:
        raise UserError("m=, n=, tokens= and rounds= must be whole numbers from 1")
    return values


def main(
    measure: Callable[..., pd.DataFrame],
    chosen: Callable[[list[str]], dict[str, Any]],
    digits: dict[str, int],
    device: str = "cpu",
) -> None:
    """Measure what the command line asks for, print the table, and write it if a file is given.

    Args:
        measure: makes the table.
        chosen: the arguments of `measure`, and `table` if it is given, for a command line.
        digits: {column: digits behind the point} of what is printed.
        device: of the measuring, as torch names it.
    """
    typed = sys.argv[1:]
    try:
        asked = chosen(typed)
        path = asked.pop("table", None)
        settings = [argument for argument in typed if not argument.startswith("table=")]
        # before the measuring, which takes minutes: its code is that of now
        made = origin(" ".join([f"python -m analysis.benchmarks.{Path(sys.argv[0]).stem}", *settings]), device)
        table = measure(**asked)
        print(head(made) + table.round(digits).to_string(index=False))
        if path:
            write_table(table, made, path)
    except UserError as error:
        sys.exit(str(error))
