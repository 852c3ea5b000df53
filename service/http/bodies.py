"""Reading a request's bytes, bounded while they stream in."""

import asyncio
import io
import mmap
from collections.abc import Callable
from dataclasses import dataclass

from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request

from service.errors import (
    DisconnectError,
    MalformedError,
    MediaTypeError,
    RequestTimeoutError,
    TooLargeError,
)

_MAX_LENGTH_DIGITS = 18
_HEAP_BYTES = 2**20


@dataclass(frozen=True)
class BodyLimits:
    """Limits of a body.

    Attributes:
        max_bytes: largest size.
        timeout_s: longest pause, seconds.
        bytes_per_s: least rate.
    """

    max_bytes: int
    timeout_s: float
    bytes_per_s: int


def check_declared(request: Request, max_bytes: int) -> None:
    """Refuse a body by its headers, before any of it is read.

    Raises:
        MalformedError: a Content-Length that is no number.
        MediaTypeError: a compressed body.
        TooLargeError: more than ``max_bytes``.
    """
    encodings = request.headers.getlist("content-encoding")
    if any(encoding.strip().lower() not in ("", "identity") for encoding in encodings):
        raise MediaTypeError(
            f"Bodies with Content-Encoding {', '.join(encodings)[:50]!r} are not read: send it uncompressed."
        )
    declared = request.headers.get("content-length", "0")
    if not (declared.isascii() and declared.isdecimal()):
        raise MalformedError("Content-Length is not a number.")
    if len(declared) > _MAX_LENGTH_DIGITS or int(declared) > max_bytes:
        raise _too_large(max_bytes)


async def read_body(request: Request, limits: BodyLimits, hold: Callable[[int], None]) -> bytes:
    """Read the whole body. Stops as soon as it is too large or too slow, whatever Content-Length says.

    Every byte earns the body time, up to ``limits.timeout_s`` from now: so much it may pause, and so much
    it may be behind the least rate.

    Args:
        request: its headers are there.
        limits: of the body.
        hold: called with the number of bytes so far, before they are kept; raises where there is no room.

    Raises:
        MalformedError: an empty body.
        DisconnectError: the client went away.
        RequestTimeoutError: too slow.
        TooLargeError: more than ``limits.max_bytes``.
    """
    loop = asyncio.get_running_loop()
    body = _Buffer(limits.max_bytes)
    until_s = loop.time() + limits.timeout_s
    try:
        async with asyncio.timeout_at(until_s) as timeout:
            async for chunk in request.stream():
                num_bytes = len(body) + len(chunk)
                if num_bytes > limits.max_bytes:
                    raise _too_large(limits.max_bytes)
                hold(num_bytes)
                body.write(chunk)
                earned_s = until_s + len(chunk) / limits.bytes_per_s
                until_s = min(earned_s, loop.time() + limits.timeout_s)
                timeout.reschedule(until_s)
    except ClientDisconnect as exc:
        raise DisconnectError("The client went away before its body was complete.") from exc
    except TimeoutError as exc:
        raise RequestTimeoutError(
            f"The body came too slowly: it may pause for {limits.timeout_s:g} s, "
            f"and has at least {limits.bytes_per_s} bytes per second."
        ) from exc
    if len(body) == 0:
        raise MalformedError("The body is empty.")
    return body.take()


class _Buffer:
    """Bytes that come one after the other.

    Many are kept in pages of their own, which take no memory until they are written and give it back at once:
    a heap in which several large bodies grow side by side keeps twice their size.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._bytes: io.BytesIO | mmap.mmap = io.BytesIO()

    def __len__(self) -> int:
        return self._bytes.tell()

    def write(self, chunk: bytes) -> None:
        """Append, up to ``max_bytes`` in all."""
        if isinstance(self._bytes, io.BytesIO) and len(self) + len(chunk) > _HEAP_BYTES:
            pages = mmap.mmap(-1, self._max_bytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            pages.write(self._bytes.getvalue())
            self._bytes = pages
        self._bytes.write(chunk)

    def take(self) -> bytes:
        """All of it; the buffer is of no use after."""
        if isinstance(self._bytes, io.BytesIO):
            return self._bytes.getvalue()
        with self._bytes as pages:
            return pages[: len(self)]


def media_type_of(request: Request) -> tuple[str, dict[bytes, bytes]]:
    """Content-Type in lower case without its parameters (empty where absent), and the parameters."""
    media_type, parameters = parse_options_header(request.headers.get("content-type", ""))
    return media_type.decode("latin-1"), parameters


def _too_large(max_bytes: int) -> TooLargeError:
    return TooLargeError(f"The body is larger than {max_bytes} bytes, the most that is accepted.")
