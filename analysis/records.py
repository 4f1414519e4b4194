"""Reads the records of finished runs, from git (analysis/records) and from this machine (outputs/runs).

    python -m analysis.records add outputs/runs/*

adds runs to those in git, or replaces them. The files there, which `xz -dc` shows, are `runs.jsonl.xz` (a line per run: its
record.json without what is of one machine), `fits.csv.xz` (a row per matrix and run, the columns of fits.csv behind the run's
signature) and `steps.csv.xz` (about 50 steps of each retraining). Runs are sorted by time, and equal runs give equal bytes.
"""

import csv
import io
import lzma
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from analysis.composed import ROOT
from analysis.settings import run_settings
from nla.harness.fits_table import COLUMNS, first_problem, parse_fits, table_text, to_cell, to_row
from nla.harness.record import NOT_IN_SIGNATURE, SCHEMA, RunRecord, read_history, read_record
from nla.machine.errors import UserError
from nla.machine.files import write_atomically

IN_GIT = ROOT / "analysis" / "records"
PLACES = (IN_GIT, ROOT / "outputs" / "runs")
ROWS = 50  # about as many steps of each retraining are kept in git


def load_records(places: Iterable[Path] = PLACES) -> list[RunRecord]:
    """The finished runs in these folders, sorted by model, method and ratio. Of runs with equal settings, only the latest."""
    done = [record for place in places for record in read_place(place) if record.status == "done"]
    latest: dict[tuple, RunRecord] = {}
    for record in sorted(done, key=by_time):
        settings = run_settings(record)
        del settings["signature"]
        latest[tuple((value is not None, value) for value in settings.values())] = record
    return [latest[key] for key in sorted(latest)]


def by_time(record: RunRecord) -> tuple[str, str]:
    return record.finished or "", record.signature


def read_place(place: Path) -> list[RunRecord]:
    """The records in a folder, which has either the files that are kept in git, or one folder per run."""
    if (place / "runs.jsonl.xz").exists():
        return read_collection(place)
    return [read_run(path.parent) for path in sorted(place.glob("*/record.json"))]


def read_run(folder: Path) -> RunRecord:
    """The record of one run, with its fits and its history."""
    record = read_record(folder)
    record.history = read_history(folder)
    return record


def read_collection(folder: Path) -> list[RunRecord]:
    """The records that are kept in git, with their fits and thinned histories.

    Raises:
        UserError: a file is damaged. The message names the file, the line and the field.
    """
    path = folder / "runs.jsonl.xz"
    records = {}
    for number, line in enumerate(read_xz(path).splitlines(), 1):
        try:
            record = RunRecord.model_validate_json(line)
        except ValidationError as error:
            raise UserError(f"{path}: line {number} is no record of schema {SCHEMA}: {first_problem(error)}") from error
        records[record.signature] = record
    table = folder / "fits.csv.xz"
    for run, fit in parse_fits(read_xz(table), table, ["signature", *COLUMNS]):
        of_run(records, run["signature"], table).fits.append(fit)
    table = folder / "steps.csv.xz"
    for step in csv.DictReader(io.StringIO(read_xz(table))):
        record = of_run(records, step.pop("signature"), table)
        record.history.append({name: to_number(cell) for name, cell in step.items() if cell})
    return list(records.values())


def of_run(records: dict[str, RunRecord], signature: str, table: Path) -> RunRecord:
    if signature not in records:
        raise UserError(f"{table} has rows of run {signature}, which is not in runs.jsonl.xz beside it")
    return records[signature]


def to_number(cell: str) -> int | float:
    return int(cell) if cell.isdigit() else float(cell)


def write_collection(records: Iterable[RunRecord], folder: Path) -> None:
    """Write the records into a folder, in the form that is kept in git."""
    ordered = sorted(records, key=by_time)
    lines = [without_noise(record).model_dump_json(by_alias=True, exclude=left_out(record)) for record in ordered]
    fits = [{"signature": record.signature, **to_row(fit)} for record in ordered for fit in record.fits]
    steps = [{"signature": record.signature, **step} for record in ordered for step in map(to_cells, record.history)]
    columns = list(dict.fromkeys(name for step in steps for name in step)) or ["signature"]
    write_xz(folder / "runs.jsonl.xz", "".join(f"{line}\n" for line in lines))
    write_xz(folder / "fits.csv.xz", table_text(["signature", *COLUMNS], fits))
    write_xz(folder / "steps.csv.xz", table_text(columns, steps))


def without_noise(record: RunRecord) -> RunRecord:
    """The record without the settings that change no figure, and without the folders of the machine that it was made on."""
    config = without_folders({key: value for key, value in record.config.items() if key not in NOT_IN_SIGNATURE})
    typed = [word.partition("=") for word in shlex.split(record.command or "")]
    words = [key + equals + (Path(value).name if key.endswith(".path") else value) for key, equals, value in typed]
    command = shlex.join(word for word in words if word.partition("=")[0].partition(".")[0] not in NOT_IN_SIGNATURE) or None
    return record.model_copy(update={"config": config, "command": command})


def without_folders(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with the name alone of the file or folder in every `path`. A digest of its contents is in `made_from`."""

    def kept(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return without_folders(value)
        return Path(value).name if key == "path" and isinstance(value, str) else value

    return {key: kept(key, value) for key, value in settings.items()}


def left_out(record: RunRecord) -> set[str]:
    """Fields that are not kept in git: the seal, the folder of the saved model, and continuations if there are none."""
    return {"seal", "saved"} if record.continuations else {"seal", "saved", "continuations"}


def thinned(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """About ROWS evenly spaced steps, the last step, and all steps with a held-out loss."""
    every = -(-len(rows) // ROWS)
    return [row for i, row in enumerate(rows) if i % every == 0 or "watched" in row or i == len(rows) - 1]


def to_cells(step: dict[str, Any]) -> dict[str, str]:
    """The scalar figures of a step, as cells of a table."""
    return {name: to_cell(value) for name, value in step.items() if isinstance(value, int | float)}


def read_xz(path: Path) -> str:
    try:
        return lzma.decompress(path.read_bytes()).decode()
    except (OSError, EOFError, ValueError, lzma.LZMAError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def write_xz(path: Path, text: str) -> None:
    """Write an xz file, which has no time and no name, so that equal texts give equal files."""
    write_atomically(path, lzma.compress(text.encode(), preset=9))


def add(folders: Iterable[Path], collection: Path = IN_GIT) -> None:
    """Add runs to those in git. Unfinished runs, and runs of code that was not committed, are printed and not added."""
    records = {record.signature: record for record in read_place(collection)}
    for folder in folders:
        record = read_run(folder)
        if record.status != "done":
            print(f"not added: {folder}: its status is {record.status}")
        elif record.environment["dirty"] or not record.environment["commit"]:
            print(f"not added: {folder}: the code that made it was not committed")
        else:
            record.history = thinned(record.history)
            records[record.signature] = record
            print(f"added: {folder}")
    write_collection(records.values(), collection)


if __name__ == "__main__":
    if sys.argv[1:2] != ["add"] or len(sys.argv) < 3:
        sys.exit(__doc__)
    try:
        add(map(Path, sys.argv[2:]))
    except UserError as error:
        sys.exit(f"error: {error}")
