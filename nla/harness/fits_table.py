"""The table `fits.csv` of a run: one row per matrix, floats with five significant digits."""

import csv
import io
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, PlainSerializer, ValidationError

from nla.machine.errors import UserError

DIGITS = 5  # significant digits of every float


class TermSize(NamedTuple):
    """One term of a matrix: kernel name, number h of triplets, and columns r per triplet. Both are 0 without triplets."""

    kernel: str
    h: int
    r: int


def parse_terms(text: str) -> list[TermSize]:
    """The terms in a text that `Term.describe` wrote.

    Raises:
        ValueError: a term has no name, or its h or r is not a number.
    """
    sizes = []
    for term in text.split(" + "):
        words = term.split()
        if not words or "=" in words[0]:
            raise ValueError(f"{text!r} is no sum of terms such as 'piecewise h=43 r=20'")
        numbers = {key: int(value) for key, _, value in (word.partition("=") for word in words) if key in ("h", "r")}
        sizes.append(TermSize(words[0], numbers.get("h", 0), numbers.get("r", 0)))
    return sizes


def rounded(value: float) -> float:
    """The float rounded to five significant digits."""
    return float(f"{value:.{DIGITS}g}")


def parse_shape(value: Any) -> Any:
    """Split a text such as `192x576` into its numbers. Other values are returned as they are."""
    return tuple(value.split("x")) if isinstance(value, str) else value


@cache
def check_terms(text: str) -> str:
    parse_terms(text)
    return text


def first_problem(error: ValidationError) -> str:
    """The first error, as `field: message`."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the file"
    return f"{where}: {first['msg']}"


def none_if_empty(value: Any) -> Any:
    return None if value == "" else value


Shape = Annotated[tuple[int, int], BeforeValidator(parse_shape), PlainSerializer(lambda shape: f"{shape[0]}x{shape[1]}")]
Figure = Annotated[float, AfterValidator(rounded)]
FigureOrNone = Annotated[Figure | None, BeforeValidator(none_if_empty)]
CountOrNone = Annotated[int | None, BeforeValidator(none_if_empty)]


class FitRecord(BaseModel):
    """The figures of one matrix; see `nla.methods.fit.Fit` for the meaning and unit of each.

    Attributes:
        terms: kernel, h and r of each term, as text; `parse_terms` reads it.
        n_params, bits: size of the fit, in numbers and in bits.
        status: code of how the fit ended, and codes of repairs; `nla.solvers.base` explains them.
        fitted, kept: number of parameters before and after retraining; None without retraining.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    shape: Shape
    terms: Annotated[str, AfterValidator(check_terms)]
    n_params: int
    bits: int
    relative_error: Figure
    weighted_error: FigureOrNone = None
    svd_error: Figure
    svd_llm_error: FigureOrNone = None
    floor: Figure
    weighted_floor: FigureOrNone = None
    optimum: FigureOrNone = None
    steps: int
    seconds: Figure
    flops: int
    peak_bytes: int
    status: str
    fitted: CountOrNone = None
    kept: CountOrNone = None

    @property
    def kept_fraction(self) -> float:
        """Number of parameters stored at the end, as a fraction of those of the dense matrix."""
        return (self.n_params if self.kept is None else self.kept) / (self.shape[0] * self.shape[1])


COLUMNS = list(FitRecord.model_fields)


def to_row(fit: FitRecord) -> dict[str, str]:
    """The cells of a matrix's row, as text. A cell is empty if its figure is unknown."""
    return {name: to_cell(value) for name, value in fit.model_dump().items()}


def to_cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.{DIGITS}g}" if isinstance(value, float) else str(value)


def fits_text(fits: list[FitRecord]) -> str:
    """The text of the table of these matrices."""
    return table_text(COLUMNS, map(to_row, fits))


def table_text(columns: list[str], rows: Iterable[dict[str, str]]) -> str:
    """The text of a CSV table with these columns. A cell is empty if its row does not have it."""
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def read_fits(path: Path) -> list[FitRecord]:
    """The matrices of a `fits.csv`.

    Raises:
        UserError: the file is missing or incomplete, or a figure is not valid. The message names file, row and field.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); delete its folder to run again") from error
    return [fit for _, fit in parse_fits(text, path, COLUMNS)]


def parse_fits(text: str, path: Path, columns: list[str]) -> list[tuple[dict[str, str], FitRecord]]:
    """(other cells, matrix) of every row of a CSV text. `columns` are those of a FitRecord, and any others.

    Raises:
        UserError: the text is damaged. The message names `path`, the row and the field.
    """
    rows = csv.DictReader(io.StringIO(text))
    if list(rows.fieldnames or []) != columns:
        raise UserError(f"{path} is not a table of fits: its columns are {rows.fieldnames}, not {columns}; delete it")
    found, around = [], [name for name in columns if name not in COLUMNS]
    for number, row in enumerate(rows, 1):
        cut = [name for name, value in row.items() if name is None or value is None]
        others = {name: row.pop(name) for name in around}
        try:
            found.append((others, FitRecord.model_validate(row)))
        except ValidationError as error:
            problem = first_problem(error)
            raise UserError(f"{path} is damaged: row {number}: {problem}; delete its folder to run again") from error
        if cut:
            raise UserError(f"{path} is damaged: row {number} is not whole ({cut[0]}); delete its folder to run again")
    if not text.endswith("\n"):
        raise UserError(f"{path} is damaged: its last row is cut; delete its folder to run again")
    return found
