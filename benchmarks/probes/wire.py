"""HTTP/1.1 by hand: requests as bytes, well formed or not, and what came back, byte by byte.

Client libraries repair or refuse what these scenarios must send, and hide how an exchange ended.
"""

import asyncio
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from urllib.parse import urlencode, urlsplit

Query = Sequence[tuple[str, object]]

_READ_BYTES = 1 << 16
_PROBLEM_FIELDS = {"type", "title", "status", "detail", "request_id"}


@dataclass(frozen=True)
class Answer:
    """Answer to one request, byte by byte.

    Attributes:
        status: HTTP status; 0 where not even a whole head came.
        headers: by name in lower case.
        body: as far as it came.
        num_bytes: everything that was received.
        complete: whether head and body came whole.
    """

    status: int = 0
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""
    num_bytes: int = 0
    complete: bool = False

    @property
    def ends_connection(self) -> bool:
        """Whether the server said that it closes the connection."""
        return not self.complete or self.headers.get("connection", "").lower() == "close"

    def problem_fault(self) -> str | None:
        """The fault of an answer that should be a problem document, or None."""
        if self.headers.get("content-type") != "application/problem+json":
            return f"content type {self.headers.get('content-type')}"
        try:
            document = json.loads(self.body)
        except ValueError:
            return "not JSON"
        if not isinstance(document, dict) or set(document) != _PROBLEM_FIELDS:
            return "other fields"
        if document["status"] != self.status or document["request_id"] != self.headers.get("x-request-id"):
            return "another status or request id"
        detail = document["detail"]
        if not isinstance(detail, str) or not detail or "Traceback" in detail or 'File "' in detail:
            return "no sentence of detail, or a traceback"
        if self.status in (429, 503) and not self.headers.get("retry-after", "").isdecimal():
            return "no Retry-After"
        return None


def request(
    method: str,
    path: str,
    body: bytes = b"",
    *,
    query: Query = (),
    headers: Mapping[str, str] | None = None,
) -> bytes:
    """A well-formed request."""
    target = path + ("?" + urlencode(query) if query else "")
    fields = {"Host": "service", "Content-Length": str(len(body)), **(headers or {})}
    head = "".join(f"{name}: {value}\r\n" for name, value in fields.items())
    return f"{method} {target} HTTP/1.1\r\n{head}\r\n".encode("latin-1") + body


class Connection:
    """One connection to the service."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def open(cls, url: str) -> "Connection":
        """Connect.

        Raises:
            OSError: nobody listens, or no more connections are taken.
        """
        address = urlsplit(url)
        return cls(*await asyncio.open_connection(address.hostname, address.port, limit=1 << 20))

    async def send(self, data: bytes) -> bool:
        """Send; False where the connection broke first."""
        try:
            self.writer.write(data)
            await self.writer.drain()
        except OSError:
            return False
        return True

    async def receive(self) -> Answer:
        """The next answer, or as much of it as came before the connection ended."""
        head = b""
        try:
            head = await self.reader.readuntil(b"\r\n\r\n")
        except (OSError, asyncio.LimitOverrunError):
            return Answer(num_bytes=len(head))
        except asyncio.IncompleteReadError as exc:
            return Answer(num_bytes=len(exc.partial))
        status, headers = _parse_head(head)
        if 100 <= status < 200:  # Expect: 100-continue
            return await self.receive()
        body, complete = await self._body(headers)
        return Answer(status, headers, body, len(head) + len(body), complete)

    async def exchange(self, data: bytes) -> Answer:
        """Send a request and wait for its answer, which may come before all was sent."""
        sending = asyncio.create_task(self.send(data))
        try:
            return await self.receive()
        finally:
            sending.cancel()
            with suppress(asyncio.CancelledError):
                await sending

    def finish_sending(self) -> None:
        """Say that no more comes, and go on listening."""
        with suppress(OSError):
            self.writer.write_eof()

    def close(self) -> None:
        """Close in the ordinary way."""
        self.writer.close()

    def abort(self) -> None:
        """Close at once, and drop unsent bytes."""
        self.writer.transport.abort()

    async def _body(self, headers: Mapping[str, str]) -> tuple[bytes, bool]:
        body = bytearray()
        declared = headers.get("content-length")
        length = int(declared) if declared is not None and declared.isdecimal() else None
        while length is None or len(body) < length:
            try:
                chunk = await self.reader.read(
                    _READ_BYTES if length is None else min(_READ_BYTES, length - len(body))
                )
            except OSError:
                return bytes(body), False
            if not chunk:
                return bytes(body), length is None
            body += chunk
        return bytes(body), True


async def exchange(url: str, data: bytes, *, timeout_s: float = 120.0, finish: bool = False) -> Answer:
    """One request on a connection of its own.

    Args:
        url: of the service.
        data: the request.
        timeout_s: how long to wait; an answer of status 0 after.
        finish: end the sending side after the request, as a client does that has no more to say.
    """
    try:
        connection = await Connection.open(url)
    except OSError:
        return Answer()
    try:
        async with asyncio.timeout(timeout_s):
            if finish:
                await connection.send(data)
                connection.finish_sending()
                return await connection.receive()
            return await connection.exchange(data)
    except TimeoutError:
        return Answer()
    finally:
        connection.close()


def _parse_head(head: bytes) -> tuple[int, dict[str, str]]:
    first, *lines = head.decode("latin-1").split("\r\n")
    words = first.split(" ")
    status = int(words[1]) if len(words) > 1 and words[1].isdecimal() else 0
    pairs = (line.partition(":") for line in lines if line)
    return status, {name.strip().lower(): value.strip() for name, _, value in pairs}
