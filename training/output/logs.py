"""A run's figures: tables that a crash may leave cut, and TensorBoard's events beside them."""

import csv
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from training.errors import RecipeError
from training.output.tables import read_table, write_table

logger = logging.getLogger(__name__)

TABLES = ("train", "validation")
EVENTS = "events"
GRIDS = "grids"


class RunLog:
    """Appends figures to ``<table>.csv`` in a run directory.

    Args:
        output: the run directory.
        with_events: write the same figures, and each validation's picture, for TensorBoard under ``events``.

    Raises:
        RecipeError: TensorBoard is wanted and not installed.
    """

    def __init__(self, output: Path, with_events: bool) -> None:
        self.output = output
        self._make_events = _event_writer() if with_events else None
        self._events: Any = None

    def begin(self, num_steps: int) -> None:
        """Drop what a killed run logged after its last saved state, at ``num_steps`` steps."""
        for name in TABLES:
            _keep_rows(self.output / f"{name}.csv", num_steps)
        if self._make_events is not None:
            self._events = self._make_events(str(self.output / EVENTS), purge_step=num_steps + 1)

    def append(self, table: str, num_steps: int, values: Mapping[str, float]) -> None:
        """Log figures after ``num_steps`` steps."""
        _append_row(self.output / f"{table}.csv", num_steps, values)
        if self._events is None:
            return
        for name, value in values.items():
            self._events.add_scalar(f"{table}/{name}", value, num_steps)
        picture = self.output / GRIDS / f"{num_steps:06d}.png"
        if table == "validation" and picture.exists():
            self._events.add_image("pictures", np.asarray(Image.open(picture)), num_steps, dataformats="HWC")
        self._events.flush()


def _event_writer() -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as exc:
        raise RecipeError(
            "field 'tensorboard': TensorBoard is not installed: pip install 'drorae[tensorboard]'"
        ) from exc
    return SummaryWriter


def _append_row(file: Path, num_steps: int, values: Mapping[str, float]) -> None:
    """Add a row to a table. A new column goes behind the others; a cell without a figure stays empty."""
    row = {"step": num_steps, **{name: _rounded(value) for name, value in values.items()}}
    table = read_table(file)
    columns = table.columns or list(row)
    added = [name for name in row if name not in columns]
    dropped = [name for name in columns if name not in row and table.rows and table.rows[-1][name]]
    if added:
        write_table(file, replace(table, columns=[*columns, *added]))
    if added or dropped:
        changes = [f"{name} is new" for name in added] + [f"{name} is no longer computed" for name in dropped]
        logger.warning("%s, from step %d on: %s; cells stay empty", file, num_steps, ", ".join(changes))
    is_new = not table.columns
    with file.open("w" if is_new else "a", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, fieldnames=[*columns, *added], lineterminator="\n")
        if is_new:
            writer.writeheader()
        writer.writerow(row)


def _rounded(value: float) -> float | int:
    return value if isinstance(value, int) else float(f"{value:.6g}")


def _keep_rows(file: Path, num_steps: int) -> None:
    """Keep a table's whole lines up to a step."""
    if not file.exists():
        return
    table = read_table(file)
    kept = [row for row in table.rows if int(row["step"]) <= num_steps]
    if table.num_damaged:
        logger.warning("%s: dropped %d damaged lines", file, table.num_damaged)
    if kept:
        write_table(file, replace(table, rows=kept))
    else:
        file.unlink()
