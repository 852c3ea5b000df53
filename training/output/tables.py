"""Tables that a run appends to, as a crash may leave them."""

from dataclasses import dataclass, field
from pathlib import Path

from training.output.files import write_atomically


@dataclass(frozen=True)
class Table:
    """Rows by the header's columns, of which the first is the step.

    Attributes:
        columns: empty where the file is absent or its header is damaged.
        rows: cells by column, as text.
        num_damaged: lines that were left out: cut, of other columns, or without a step.
    """

    columns: list[str] = field(default_factory=list)
    rows: list[dict[str, str]] = field(default_factory=list)
    num_damaged: int = 0


def read_table(file: Path) -> Table:
    """The whole lines of a table."""
    if not file.exists():
        return Table()
    *lines, cut = file.read_text(encoding="utf-8", errors="replace").split("\n")
    cells = [line.split(",") for line in lines if line]
    if not cells or cells[0][0] != "step":
        return Table(num_damaged=len(cells) + bool(cut))
    columns, *rows = cells
    whole = [row for row in rows if len(row) == len(columns) and row[0].isdecimal()]
    num_damaged = len(rows) - len(whole) + bool(cut)
    return Table(columns, [dict(zip(columns, row, strict=True)) for row in whole], num_damaged)


def write_table(file: Path, table: Table) -> None:
    """Replace a table; a cell that a row lacks stays empty."""
    lines = [table.columns, *([row.get(name, "") for name in table.columns] for row in table.rows)]
    write_atomically(file, "".join(",".join(line) + "\n" for line in lines))
