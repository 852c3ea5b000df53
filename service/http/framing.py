"""The ends of HTTP/1.1 messages, and the heads that are refused (RFC 9112).

The parser would go through every request that it is given at once. It is given pieces instead, none of
which reaches beyond the end of a message: only then does the next request wait as the bytes that it is.
"""

import re
from collections.abc import Sequence

from service.errors import HeadersTooLargeError, MalformedError, TransferCodingError, VersionError

MAX_VALUE_BYTES = 2048
"""Longest value of a header that somebody here, or in a library, takes apart."""

_PARSED = frozenset(
    b"accept access-control-request-headers access-control-request-method authorization connection "
    b"content-encoding content-length content-type expect host origin transfer-encoding upgrade "
    b"x-request-timeout".split()
)
_IGNORED_WHERE_LONG = frozenset((b"traceparent", b"tracestate", b"x-request-id"))
_HOST = re.compile(rb"[A-Za-z0-9._~%!$&'()*+,;=:\[\]-]*")
_FOREIGN_PROTOCOL = re.compile(rb" (?!HTTP/)([A-Z]+)/[0-9]\.[0-9]\r?\n\Z")  # the parser takes RTSP as HTTP
_PROTOCOL_BYTES = 16  # of the request line's end
_END_OF_HEAD = b"\r\n\r\n"
_LINE_START_BYTES = 32  # of a chunk's line, which begins with the size
_END_OF_CHUNK = b"\r\n"

Headers = Sequence[tuple[bytes, bytes]]


class Framer:
    """Cuts the bytes of a connection into pieces: a request or chunk's line, headers, or what came of a body.

    It relies on the parser, which is given each piece before the next one is cut, and refuses malformed ones.
    """

    def __init__(self) -> None:
        self.begin_head()

    def begin_head(self) -> None:
        """A message is complete: the next one's head follows."""
        self._left = 0  # of a body, or a chunk
        self._is_chunked = False
        self._in_request_line = True
        self._tail = b""  # what came last of a head, where its end may have begun
        self._line = b""  # how a chunk's line begins
        self._line_ended = False

    def begin_body(self, num_bytes: int | None) -> None:
        """A head is complete: so much body follows, or chunks where that is None."""
        self.begin_head()
        self._left, self._is_chunked = num_bytes or 0, num_bytes is None

    def cut(self, data: bytes, start: int) -> int:
        """The end of the piece that begins at ``start``, a place before the end of ``data``.

        Raises:
            VersionError: a request line of another protocol.
        """
        if self._line_ended:
            self._begin_chunk()
        if self._left > 0:
            end = min(len(data), start + self._left)
            self._left -= end - start
            return end
        if self._is_chunked:
            return self._cut_line(data, start)
        return self._cut_request_line(data, start) if self._in_request_line else self._cut_head(data, start)

    def _begin_chunk(self) -> None:
        """The parser has accepted a line: a chunk's, or one of the trailer, whose end the parser tells."""
        size = self._line.split(b";")[0].strip()
        num_bytes = int(size, 16) if _is_hexadecimal(size) else 0
        self._left = num_bytes + len(_END_OF_CHUNK) if num_bytes else 0
        self._line, self._line_ended = b"", False

    def _cut_line(self, data: bytes, start: int) -> int:
        end = data.find(b"\n", start) + 1
        self._line_ended = end > 0
        end = end or len(data)
        self._line = (self._line + data[start:end])[:_LINE_START_BYTES]
        return end

    def _cut_request_line(self, data: bytes, start: int) -> int:
        end = data.find(b"\n", start) + 1 or len(data)
        self._tail = (self._tail + data[max(start, end - _PROTOCOL_BYTES) : end])[-_PROTOCOL_BYTES:]
        foreign = _FOREIGN_PROTOCOL.search(self._tail)
        if foreign:
            raise VersionError(f"{foreign[1].decode()} is not spoken here: send the request as HTTP/1.1.")
        if self._tail.endswith(b"\n") and self._tail.strip():  # blank lines may come before it
            self._in_request_line = False
            self._tail = self._tail[-3:]
        return end

    def _cut_head(self, data: bytes, start: int) -> int:
        across = (self._tail + data[start : start + 3]).find(_END_OF_HEAD)
        within = data.find(_END_OF_HEAD, start)
        if across < 0 and within < 0:
            self._tail = (self._tail + data[max(start, len(data) - 3) :])[-3:]
            return len(data)
        begins = start + across - len(self._tail) if across >= 0 else within
        self._tail = b""
        return begins + len(_END_OF_HEAD)


def is_read(name: bytes, value: bytes) -> bool:
    """Whether a header is taken, by its name in lower case; a trace or id that is too long counts as absent.

    Raises:
        HeadersTooLargeError: its value is taken apart, and too long for that.
    """
    if len(value) <= MAX_VALUE_BYTES:
        return True
    if name in _PARSED:
        raise HeadersTooLargeError(
            f"The header {name.decode('latin-1')!r} is longer than {MAX_VALUE_BYTES} bytes."
        )
    return name not in _IGNORED_WHERE_LONG


def check_version(version: str) -> None:
    """Refuse versions other than HTTP/1.0 and HTTP/1.1.

    Raises:
        VersionError: another one.
    """
    if version not in ("1.0", "1.1"):
        raise VersionError(f"HTTP/{version} is not spoken here: send the request as HTTP/1.1.")


def check_host(version: str, headers: Headers) -> None:
    """Refuse a request that does not say, or says twice, which host it is for.

    Raises:
        MalformedError: not one Host header that can be one; HTTP/1.0 has none or one.
    """
    hosts = [value for name, value in headers if name == b"host"]
    if len(hosts) > 1 or (version == "1.1" and not hosts):
        raise MalformedError(f"A request has one Host header; this one has {len(hosts)}.")
    if hosts and not _HOST.fullmatch(hosts[0]):
        raise MalformedError("The Host header is no host name or address.")


def body_bytes(version: str, headers: Headers) -> int | None:
    """Length of the body that follows a head; None where it comes in chunks.

    Raises:
        MalformedError: the headers contradict each other, so that its end is uncertain.
        TransferCodingError: a coding other than chunked.
    """
    lengths = [value for name, value in headers if name == b"content-length"]
    fields = [value for name, value in headers if name == b"transfer-encoding"]
    if not fields:
        return _length(lengths)
    if version != "1.1" or lengths:
        raise MalformedError("Transfer-Encoding is of HTTP/1.1 alone, and excludes Content-Length.")
    codings = [coding.strip().lower() for coding in b",".join(fields).split(b",")]
    if codings[-1] != b"chunked" or b"chunked" in codings[:-1]:
        raise MalformedError("The last transfer coding of a request is 'chunked', which occurs once.")
    if len(codings) > 1:
        raise TransferCodingError("Bodies with a transfer coding other than 'chunked' are not read.")
    return None


def _length(values: Sequence[bytes]) -> int:
    if len(set(values)) > 1 or not all(value.isdigit() for value in values):
        raise MalformedError("Content-Length is not one number.")
    return int(values[0]) if values else 0


def _is_hexadecimal(text: bytes) -> bool:
    return bool(text) and not text.strip(b"0123456789abcdefABCDEF")
