"""HTTP/1.1 on a socket: uvicorn's httptools protocol, with bounds on connections and on request heads.

Uvicorn bounds neither how many connections are open, nor how long and how large the request line and
headers may be; a client that sends them byte by byte, or never ends them, would hold memory and a place.
"""

import asyncio
import json
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from service.errors import HeadersTooLargeError, MalformedError, ServiceError
from service.metrics import Metrics
from service.problems import PROBLEM_MEDIA_TYPE, problem
from service.settings import Settings
from service.tracing import random_hex

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 100
LINGER_S = 2.0
"""How long a refused client has to read why: closing at once, with bytes of it unread, would reset the
connection and take the answer with it."""


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection.

    Attributes:
        metrics: where closed connections are counted.
        max_connections: most connections of the server; further ones are closed at once.
        header_timeout_s: from the connection, or a further request's first byte, to its complete headers.
        write_timeout_s: how long a client may leave an answer unread.
    """

    metrics: ClassVar[Metrics]
    max_connections: ClassVar[int]
    header_timeout_s: ClassVar[float]
    write_timeout_s: ClassVar[float]

    _refused = False  # nothing that comes in is read any more
    _in_head = False  # a request has begun, its headers are not complete
    _in_body = False  # the headers of a request are complete, its body is not
    _in_upgrade = False  # the parser stops after this head, as if another protocol followed
    _num_headers = 0
    _head_bytes = 0  # of the request line and headers, as parsed
    _silent_bytes = 0  # came since the parser last had something to tell
    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, or close it where there are too many."""
        if len(self.connections) >= self.max_connections:
            self._refused = True
            self.transport = transport
            self._count("limit")
            transport.abort()
            return
        super().connection_made(transport)
        self._start_timer(self.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self._stop_timer()
        self._stop_write_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read as fast as it is answered."""
        super().pause_writing()
        self._stop_write_timer()
        self._write_timer = self.loop.call_later(self.write_timeout_s, self._on_write_timer)

    def resume_writing(self) -> None:
        """It has read enough."""
        self._stop_write_timer()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Parse what came; what is wrong with it is answered, never raised."""
        if self._refused:
            return
        self._unset_keepalive_if_required()
        self._silent_bytes += len(data)
        try:
            self._feed(memoryview(data))
        except httptools.HttpParserError as exc:
            self._refuse_bytes(exc)
            return
        if self._silent_bytes > MAX_HEAD_BYTES:
            self._refuse(_too_large())
        elif self._is_idle() and self._timer is None and not self._refused:
            self._await_request()

    def on_message_begin(self) -> None:
        """A request line begins."""
        super().on_message_begin()
        self._in_head = True
        self._num_headers = self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Part of the request's target."""
        self._head_bytes += len(url)
        self._check_head()
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header, or a chunked body's trailer, which is counted and dropped."""
        self._num_headers += 1
        self._head_bytes += len(name) + len(value) + len(": \r\n")
        self._check_head()
        if not self._in_body:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Hand the request to the application."""
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise MalformedError("This is no proxy.")
            self._in_upgrade = True
            return
        self._stop_timer()
        self._silent_bytes = 0
        super().on_headers_complete()
        self._in_head, self._in_body = False, True

    def on_body(self, body: bytes) -> None:
        """Part of the body."""
        self._silent_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is complete."""
        if self._in_upgrade:
            return
        self._in_body = False
        self._silent_bytes = 0
        self._stop_timer()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        """Wait for the next request, or for the rest of one that was answered early."""
        super().on_response_complete()
        if self._is_idle() and not self._refused and not self.transport.is_closing():
            self._await_request()

    def shutdown(self) -> None:
        """Close once what is in flight is answered."""
        if self._refused and self._is_idle():
            self.transport.close()
        else:
            super().shutdown()

    def _feed(self, data: memoryview) -> None:
        """Parse; a request to change the protocol is taken as if it were none, which HTTP allows.

        Java's client, for one, offers HTTP/2 with its first request. The parser would stop there and
        lose the request's body, and with it the connection.
        """
        while True:
            try:
                self.parser.feed_data(data)
            except httptools.HttpParserUpgrade as upgrade:
                data = data[upgrade.args[0] :]
                self._in_upgrade = False
                lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, self._http_version())]
                lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.feed_data(b"\r\n".join((*lines, b"", b"")))
            else:
                return

    def _http_version(self) -> bytes:
        return self.parser.get_http_version().encode()

    def _await_request(self) -> None:
        """Between requests: the rest of what has begun must come soon, the beginning of the next may take."""
        self._unset_keepalive_if_required()
        if self._in_head or self._in_body:
            self._start_timer(self.header_timeout_s)
        else:
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _check_head(self) -> None:
        if self._head_bytes > MAX_HEAD_BYTES or self._num_headers > MAX_HEADERS:
            raise _too_large()

    def _refuse_bytes(self, error: httptools.HttpParserError) -> None:
        cause = error.__context__
        if isinstance(cause, ServiceError):
            self._refuse(cause)
        else:  # a target that is no URL reaches us as the parser's error as well
            self._refuse(MalformedError("This is not HTTP/1.1."))

    def _refuse(self, error: ServiceError) -> None:
        """Answer, unless an earlier request's answer is under way, and read no more."""
        self._refused = True
        self._stop_timer()
        if isinstance(error, HeadersTooLargeError):
            self._count("header-bytes")
        if self._in_body and not self._is_idle():
            self._abandon(error)
        elif not self._is_idle():  # the requests before this one keep their answers
            self.cycle.keep_alive = False
        elif self._in_body:  # its answer is out
            self.transport.close()
        else:
            self._say(error)

    def _abandon(self, error: ServiceError) -> None:
        """End a request whose body broke off: its application learns that the client went away."""
        if self.pipeline or self.cycle.response_started:
            self.transport.close()
            return
        self.cycle.disconnected = True
        self.cycle.waiting_for_100_continue = False  # nothing may be written after what is said now
        self.cycle.message_event.set()
        self._say(error)

    def _say(self, error: ServiceError) -> None:
        request_id = random_hex(32)
        body = json.dumps(problem(error, request_id)).encode()
        head = (
            f"content-type: {PROBLEM_MEDIA_TYPE}\r\ncontent-length: {len(body)}\r\n"
            f"x-request-id: {request_id}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(STATUS_LINE[error.status] + head.encode() + body)
        if self.transport.can_write_eof():
            self.transport.write_eof()
        self._start_timer(LINGER_S)

    def _start_timer(self, delay_s: float) -> None:
        self._stop_timer()
        self._timer = self.loop.call_later(delay_s, self._on_timer)

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _stop_write_timer(self) -> None:
        if self._write_timer is not None:
            self._write_timer.cancel()
            self._write_timer = None

    def _on_write_timer(self) -> None:
        self._count("slow-reader")
        self.transport.abort()

    def _on_timer(self) -> None:
        self._timer = None
        if not self._refused and not self._in_body:
            self._count("header-timeout")
        self.transport.abort()

    def _count(self, reason: str) -> None:
        self.metrics.rejected_connections.labels(reason).inc()


def protocol_class(settings: Settings, metrics: Metrics) -> type[asyncio.Protocol]:
    """The protocol with a server's bounds, for ``uvicorn.Config(http=...)``."""
    bounds: dict[str, Any] = {
        "metrics": metrics,
        "max_connections": settings.max_connections,
        "header_timeout_s": settings.header_timeout_s,
        "write_timeout_s": settings.request_timeout_s,
    }
    return type("BoundedHttpProtocol", (BoundedHttpProtocol,), bounds)


def _too_large() -> HeadersTooLargeError:
    return HeadersTooLargeError(
        f"The request line and headers are larger than {MAX_HEAD_BYTES} bytes or {MAX_HEADERS} headers."
    )
