"""Lists of files in JSON, as base64: read and written in slices."""

import binascii
import io
import json
import re
from collections.abc import Iterable, Iterator

from service.codecs.json.slices import find
from service.errors import MalformedError, OptionError, TooLargeError

_GAP = re.compile(rb"[ \t\r\n]{0,1000}")
_SLICE_BYTES = 256 * 1024  # decoded in 1 ms
_ESCAPE_BYTES = len(r"\u002b")


def read_files(text: bytes, start: int, max_files: int) -> tuple[list[bytes], int]:
    """The files of a list, and where it ends.

    Args:
        text: JSON.
        start: where the list's opening bracket is.
        max_files: most files that are accepted.

    Raises:
        MalformedError: invalid JSON or base64.
        OptionError: something other than strings.
        TooLargeError: more than ``max_files``.
    """
    files: list[bytes] = []
    place = start
    while text[place : place + 1] != b"]":
        begin = _behind_gap(text, place + 1)
        if text[begin : begin + 1] != b'"':
            raise OptionError(f"The field 'images.{len(files)}' is not a string.")
        if len(files) == max_files:
            raise TooLargeError(
                f"The request has at least {max_files + 1} items; at most {max_files} are accepted."
            )
        end = find(text, b'"', begin + 1)  # base64 has no quotes that would be escaped
        if end < 0:
            raise MalformedError("The body is not valid JSON: it ends within a string.")
        files.append(_decode(text, begin + 1, end, len(files)))
        place = _behind_gap(text, end + 1)
        if text[place : place + 1] not in (b",", b"]"):
            raise MalformedError(
                f"The body is not valid JSON: a comma or bracket is missing behind image {len(files) - 1}."
            )
    return files, place + 1


def write_files(files: Iterable[bytes]) -> Iterator[bytes]:
    """The text between the brackets of a list of files."""
    for index, file in enumerate(files):
        yield b',"' if index else b'"'
        yield binascii.b2a_base64(file, newline=False)
        yield b'"'


def _behind_gap(text: bytes, place: int) -> int:
    gap = _GAP.match(text, place)
    return gap.end() if gap else place


def _decode(text: bytes, begin: int, end: int, index: int) -> bytes:
    """Standard base64 with padding, as a JSON string between ``begin`` and ``end`` holds it."""
    file = io.BytesIO()
    left = b""
    try:
        for piece in _unescaped(text, begin, end):
            if file.tell() % 3:
                raise binascii.Error("Excess data after padding")
            characters = left + piece
            num_whole = len(characters) // 4 * 4
            file.write(binascii.a2b_base64(characters[:num_whole], strict_mode=True))
            left = characters[num_whole:]
        file.write(binascii.a2b_base64(left, strict_mode=True))
    except ValueError as exc:
        raise MalformedError(f"Image {index} is not standard base64: {exc}.") from exc
    return file.getvalue()


def _unescaped(text: bytes, begin: int, end: int) -> Iterator[bytes]:
    r"""Slices of a JSON string; some clients escape ``/`` as ``\/``, or ``+`` as ``\u002b``."""
    while begin < end:
        stop = min(end, begin + _SLICE_BYTES)
        escape = text.rfind(b"\\", begin, stop) if stop < end else -1
        if escape >= max(begin + 1, stop - _ESCAPE_BYTES):  # it may go on behind the cut
            stop = escape
        piece = text[begin:stop]
        yield json.loads(b'"%s"' % piece).encode("ascii") if b"\\" in piece else piece
        begin = stop
