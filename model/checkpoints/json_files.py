"""JSON files of strangers: read only where they are regular files of a bounded size."""

import json
import stat
from pathlib import Path
from typing import Any

from model.errors import CheckpointError


def read_json_object(file: Path, max_bytes: int) -> tuple[dict[str, Any], bytes]:
    """A JSON file that holds an object, with its bytes.

    Raises:
        FileNotFoundError: there is no such file.
        CheckpointError: not a regular file, too large, unreadable, or not a JSON object.
    """
    try:
        check_regular(file)
        with file.open("rb") as stream:
            raw = stream.read(max_bytes + 1)  # a file may grow after it was looked at
    except FileNotFoundError:
        raise
    except OSError as exc:
        raise CheckpointError(f"{file}: cannot be read: {exc.strerror}") from exc
    if len(raw) > max_bytes:
        raise CheckpointError(f"{file}: over {max_bytes} bytes, so no configuration")
    try:
        fields = json.loads(raw)
    except RecursionError as exc:
        raise CheckpointError(f"{file}: not valid JSON: nested too deeply") from exc
    except ValueError as exc:
        raise CheckpointError(f"{file}: not valid JSON: {exc}") from exc
    if not isinstance(fields, dict):
        raise CheckpointError(f"{file}: holds no JSON object, so no configuration")
    return fields, raw


def check_regular(file: Path) -> int:
    """Size of a file, bytes; opening a pipe would wait, and a device has no end.

    Raises:
        OSError: there is no such file, or it may not be looked at.
        CheckpointError: it is no regular file.
    """
    status = file.stat()
    if not stat.S_ISREG(status.st_mode):
        raise CheckpointError(f"{file}: no regular file")
    return status.st_size


def nesting(value: object) -> int:
    """How deep lists and objects are nested in a JSON value; 0 for a number or a text."""
    depth, level = 0, [value]
    while level := [inner for outer in level for inner in _inside(outer)]:
        depth += 1
    return depth + isinstance(value, dict | list)


def _inside(value: object) -> list[object]:
    if isinstance(value, dict):
        return [inner for inner in value.values() if isinstance(inner, dict | list)]
    return [inner for inner in value if isinstance(inner, dict | list)] if isinstance(value, list) else []
