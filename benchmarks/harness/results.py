"""Results: rows of dataclasses, appended to CSV files and shown as a table."""

import csv
from collections.abc import Callable, Mapping, Sequence
from dataclasses import astuple, fields
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

Row = TypeVar("Row", bound="DataclassInstance")


class ResultsError(Exception):
    """A file that results cannot be appended to."""


def check_columns(path: Path, row_type: type[Row]) -> None:
    """Refuse a CSV file with other columns; a file that is absent or empty will do.

    Raises:
        ResultsError: names the file and the columns that differ.
    """
    wanted = [field.name for field in fields(row_type)]
    found = _read_header(path)
    if not found or found == wanted:
        return
    missing = ", ".join(name for name in wanted if name not in found)
    unknown = ", ".join(name for name in found if name not in wanted)
    differences = "; ".join(
        f"{label}: {names}" for label, names in (("missing", missing), ("unknown", unknown)) if names
    )
    raise ResultsError(f"{path} has other columns ({differences or 'another order'}): name another file")


def append_rows(path: Path, rows: Sequence[Row]) -> None:
    """Append rows of one type to a CSV file, with a header where the file is new.

    Raises:
        ResultsError: the file has other columns.
    """
    if not rows:
        return
    check_columns(path, type(rows[0]))
    path.parent.mkdir(parents=True, exist_ok=True)
    is_new = not _read_header(path)
    with path.open("a", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        if is_new:
            writer.writerow(field.name for field in fields(rows[0]))
        writer.writerows([_cell(value) for value in astuple(row)] for row in rows)


def format_table(rows: Sequence[Row], columns: Mapping[str, Callable[[Row], object]]) -> str:
    """A table for people: the first column left-aligned, the others right-aligned.

    Args:
        rows: the results.
        columns: a row's values to show, by heading; floats get four digits.
    """
    lines = [list(columns), *([_text(show(row)) for show in columns.values()] for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def ratio(numerator: float | None, denominator: float | None) -> float | None:
    """Their quotient, or None where one was not measured."""
    return None if numerator is None or denominator is None else numerator / denominator


def _read_header(path: Path) -> list[str]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as stream:
        return next(csv.reader(stream), [])


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _text(value: object) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)
