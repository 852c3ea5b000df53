"""Files that are written whole or not at all."""

import json
import os
from pathlib import Path
from typing import Any


def write_atomically(file: Path, data: bytes | str, previous: Path | None = None) -> None:
    """Write bytes, or text as UTF-8, under a temporary name; sync, then rename. The folder is created.

    What was there before moves to ``previous``, if that is given.

    A file has one writer at a time: what a killed one left is overwritten. Serialise to memory first, as
    torch and safetensors report a full disk in words of their own.

    Raises:
        OSError: the disk is full or the place not writable; what was there before stays.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    try:
        with partial.open("wb") as stream:
            stream.write(data.encode() if isinstance(data, str) else data)
            stream.flush()
            os.fsync(stream.fileno())
        if previous is not None and file.exists():
            os.replace(file, previous)
        os.replace(partial, file)
    except BaseException as exc:
        partial.unlink(missing_ok=True)
        if (
            isinstance(exc, OSError) and exc.filename is None
        ):  # a full disk, which write and fsync do not name
            exc.filename = str(file)
        raise


def write_json(file: Path, contents: Any) -> None:
    """Write indented JSON; a NaN or infinity is an error, as JSON has neither.

    Raises:
        OSError: as `write_atomically`.
    """
    write_atomically(file, json.dumps(contents, indent=2, allow_nan=False) + "\n")
