"""Indexes of listings: a file beside the images that spares walking a large folder or reading tar headers.

A folder's index is ``.drorae-index.json`` in it; that of ``NAME.tar`` is ``.NAME.tar.drorae-index.json``
beside it. An index is kept only where its file exists (``touch`` makes an empty one). It is used while every
folder and tar that was listed still has its size and modification time, and is written anew otherwise.
"""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

SUFFIX = ".drorae-index.json"
VERSION = 1
# Fields of a sample, without its file: the name of that relative to the listed path comes first.
Row = tuple[str, str, int | None, int | None, int | None]


def index_file(path: Path) -> Path:
    """The index of a listed folder or tar, whether it exists or not."""
    return path / SUFFIX if path.is_dir() else path.with_name(f".{path.name}{SUFFIX}")


def read_index(path: Path) -> tuple[list[Row], Counter[str]] | None:
    """Rows of samples and what was left out; None where there is no index, or an outdated one."""
    file = index_file(path)
    if not file.is_file():
        return None
    try:
        found = json.loads(file.read_bytes() or b"{}")
        if found.get("version") == VERSION and all(_state(Path(p)) == s for p, s in found["places"]):
            return [(*row,) for row in found["samples"]], Counter(found["left_out"])
    except (OSError, ValueError, KeyError, TypeError) as exc:
        logger.warning("%s: not usable, listing anew: %s", file, exc)
    return None


def write_index(path: Path, places: Sequence[Path], rows: Sequence[Row], left_out: Counter[str]) -> None:
    """Fill the index of a path, where one is kept.

    Args:
        path: the folder or tar that was listed.
        places: every folder and tar that was read for it.
        rows: its samples.
        left_out: numbers of what is no image, by the reason.
    """
    file = index_file(path)
    if not file.is_file():
        return
    try:
        contents: dict[str, Any] = {
            "version": VERSION,
            "places": [[str(place), _state(place)] for place in places],
            "left_out": dict(left_out),
            "samples": rows,
        }
        file.write_text(json.dumps(contents), encoding="utf-8")  # in place: a rename would touch the folder
    except OSError as exc:
        logger.warning("%s: cannot be written: %s", file, exc.strerror)


def _state(place: Path) -> list[int]:
    status = place.stat()
    return [status.st_size, status.st_mtime_ns]
