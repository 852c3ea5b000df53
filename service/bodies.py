"""Reading a request's bytes: bounded while they stream in, and split where they are multipart."""

from typing import TYPE_CHECKING

from python_multipart.exceptions import FormParserError
from python_multipart.multipart import MultipartParser, parse_options_header
from starlette.requests import ClientDisconnect, Request

from service.errors import (
    DisconnectError,
    MalformedError,
    MediaTypeError,
    OptionError,
    TooLargeError,
)

if TYPE_CHECKING:
    from python_multipart.multipart import MultipartCallbacks

MULTIPART = "multipart/form-data"
PART_NAME = "images"
_MAX_LENGTH_DIGITS = 18


def declared_bytes(request: Request, max_bytes: int) -> int:
    """How many bytes a body has by its headers; ``max_bytes`` where they do not tell.

    Raises:
        MalformedError: a Content-Length that is no number.
        MediaTypeError: a compressed body.
        TooLargeError: more than ``max_bytes``.
    """
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding not in ("", "identity"):
        raise MediaTypeError(
            f"Bodies with Content-Encoding {encoding[:50]!r} are not read: send it uncompressed."
        )
    declared = request.headers.get("content-length")
    if declared is None:
        return max_bytes
    if not (declared.isascii() and declared.isdecimal()):
        raise MalformedError("Content-Length is not a number.")
    if len(declared) > _MAX_LENGTH_DIGITS or int(declared) > max_bytes:
        raise _too_large(max_bytes)
    return int(declared)


async def read_body(request: Request, max_bytes: int) -> bytes:
    """The whole body; stops as soon as it is too large, whatever Content-Length says.

    Raises:
        MalformedError: an empty body.
        DisconnectError: the client went away.
        TooLargeError: more than ``max_bytes``.
    """
    chunks: list[bytes] = []
    num_bytes = 0
    try:
        async for chunk in request.stream():
            num_bytes += len(chunk)
            if num_bytes > max_bytes:
                raise _too_large(max_bytes)
            chunks.append(chunk)
    except ClientDisconnect as exc:
        raise DisconnectError("The client went away before its body was complete.") from exc
    if num_bytes == 0:
        raise MalformedError("The body is empty.")
    return b"".join(chunks)


def media_type_of(request: Request) -> tuple[str, dict[bytes, bytes]]:
    """Content-Type in lower case without its parameters (empty where absent), and the parameters."""
    media_type, parameters = parse_options_header(request.headers.get("content-type", ""))
    return media_type.decode("latin-1"), parameters


def split_multipart(body: bytes, boundary: bytes | None, max_parts: int) -> list[bytes]:
    """The contents of the parts named ``images``.

    Raises:
        MalformedError: no boundary, not multipart, incomplete, or a part without a name.
        OptionError: a part of another name.
        TooLargeError: more than ``max_parts`` parts.
    """
    if not boundary:
        raise MalformedError("The Content-Type multipart/form-data has no boundary.")
    reader = _PartReader(max_parts)
    try:
        parser = MultipartParser(boundary, reader.callbacks())
        parser.write(body)
        parser.finalize()
    except FormParserError as exc:
        raise MalformedError(f"The multipart body is malformed: {exc}.") from exc
    if not reader.complete:
        raise MalformedError("The multipart body is truncated: its closing boundary is missing.")
    if not reader.parts:
        raise MalformedError(f"The multipart body has no part named {PART_NAME!r}.")
    return reader.parts


class _PartReader:
    """Collects the parts that the parser announces."""

    def __init__(self, max_parts: int) -> None:
        self.parts: list[bytes] = []
        self.complete = False
        self._max_parts = max_parts
        self._data = bytearray()
        self._header_name = bytearray()
        self._header_value = bytearray()
        self._disposition = b""

    def callbacks(self) -> "MultipartCallbacks":
        """What the parser calls."""
        return {
            "on_part_begin": self._begin_part,
            "on_header_field": self._add_header_name,
            "on_header_value": self._add_header_value,
            "on_header_end": self._end_header,
            "on_headers_finished": self._end_headers,
            "on_part_data": self._add_data,
            "on_part_end": self._end_part,
            "on_end": self._end,
        }

    def _begin_part(self) -> None:
        if len(self.parts) == self._max_parts:
            raise TooLargeError(
                f"The request has more than {self._max_parts} items, the most that are accepted."
            )
        self._data = bytearray()
        self._disposition = b""

    def _add_header_name(self, data: bytes, start: int, end: int) -> None:
        self._header_name += data[start:end]

    def _add_header_value(self, data: bytes, start: int, end: int) -> None:
        self._header_value += data[start:end]

    def _end_header(self) -> None:
        if self._header_name.lower() == b"content-disposition":
            self._disposition = bytes(self._header_value)
        self._header_name, self._header_value = bytearray(), bytearray()

    def _end_headers(self) -> None:
        _, parameters = parse_options_header(self._disposition)
        name = parameters.get(b"name")
        if name is None:
            raise MalformedError("A part of the multipart body has no name.")
        if name != PART_NAME.encode():
            shown = name.decode("utf-8", "replace")[:100]
            raise OptionError(
                f"Unknown multipart field {shown!r}: images are sent as {PART_NAME!r}, repeated."
            )

    def _add_data(self, data: bytes, start: int, end: int) -> None:
        self._data += data[start:end]

    def _end_part(self) -> None:
        self.parts.append(bytes(self._data))

    def _end(self) -> None:
        self.complete = True


def _too_large(max_bytes: int) -> TooLargeError:
    return TooLargeError(f"The body is larger than {max_bytes} bytes, the most that is accepted.")
