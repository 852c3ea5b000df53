"""Reading a request's bytes, bounded while they stream in."""

from python_multipart.multipart import parse_options_header
from starlette.requests import ClientDisconnect, Request

from service.errors import (
    DisconnectError,
    MalformedError,
    MediaTypeError,
    TooLargeError,
)

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


def _too_large(max_bytes: int) -> TooLargeError:
    return TooLargeError(f"The body is larger than {max_bytes} bytes, the most that is accepted.")
