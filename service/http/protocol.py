"""HTTP/1.1 on a socket: uvicorn's httptools protocol, with bounds on connections and on request heads.

Uvicorn bounds neither how many connections are open, nor how long and how large the request line and
headers may be; a client that sends them byte by byte, or never ends them, would hold memory and a place.
"""

import asyncio
from typing import Any, ClassVar

import httptools
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from service.errors import (
    HeadersTooLargeError,
    MalformedError,
    RequestTimeoutError,
    ServiceError,
    UnavailableError,
    VersionError,
)
from service.http.flow import AnswerTransport, HeldFlow, ask_while_unanswered
from service.http.framing import Framer, body_bytes, check_host, check_version, is_read
from service.http.middleware import PUBLIC_PATHS
from service.http.problems import problem_message
from service.settings import Settings
from service.telemetry.metrics import Metrics

MAX_HEAD_BYTES = 64 * 1024
MAX_HEADERS = 100
SPARE_CONNECTIONS = 32
"""Beyond the limit, for probes: a supervisor that is not answered would end a process that is only busy."""
LINGER_S = 2.0
"""How long a refused client has to read why: closing at once, with bytes of it unread, would reset the
connection and take the answer with it."""
_FOREIGN_VERSION = ("Invalid HTTP version", "Pause on PRI")  # as the parser says it
_PIECES_A_TURN = 256  # parsed before other connections have their turn: about 1 ms


class BoundedHttpProtocol(HttpToolsProtocol):
    """One connection.

    Attributes:
        metrics: where closed connections are counted.
        max_connections: most connections of the server. Where a further one comes, the longest idle one is
            closed; where none is idle, it may be one of a few that only probes are answered on.
        header_timeout_s: from the connection, or a further request's first byte, to its complete headers.
        answer_timeout_s: how long a client may leave an answer unread.
        retry_after_s: sent to clients that find no place.
        idle: connections without a request, the longest idle first.
    """

    metrics: ClassVar[Metrics]
    max_connections: ClassVar[int]
    header_timeout_s: ClassVar[float]
    answer_timeout_s: ClassVar[float]
    retry_after_s: ClassVar[int]
    idle: ClassVar[dict["BoundedHttpProtocol", None]]

    _refused = False  # nothing that comes in is read any more
    _is_spare = False  # one of the connections beyond the limit
    _in_head = False  # a request has begun, its headers are not complete
    _in_body = False  # the headers of a request are complete, its body is not
    _in_upgrade = False  # the parser stops after this head, as if another protocol followed
    _num_headers = 0
    _head_bytes = 0  # of the request line and headers, as parsed
    _silent_bytes = 0  # came since the parser last had something to tell
    _unparsed = b""  # what came after a request that is not answered yet
    _ended = False  # the client sends nothing any more
    _timer: asyncio.TimerHandle | None = None
    _write_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, in the place of an idle one where there are too many."""
        further = len(self.connections) - self.max_connections
        if further >= 0 and not self._close_longest_idle():
            self._is_spare = True
            if further >= SPARE_CONNECTIONS:
                self._refused = True
                self.transport = transport
                self._count("limit")
                transport.abort()
                return
        super().connection_made(transport)
        self.flow = HeldFlow(transport)
        self._framer = Framer()
        self.idle[self] = None
        self._start_timer(self.header_timeout_s)

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self.idle.pop(self, None)
        self._unparsed = b""
        self._stop_timer()
        self._stop_write_timer()
        self._unset_keepalive_if_required()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not read as fast as it is answered."""
        super().pause_writing()
        self._stop_write_timer()
        self._write_timer = self.loop.call_later(self.answer_timeout_s, self._on_write_timer)

    def resume_writing(self) -> None:
        """It has read enough."""
        self._stop_write_timer()
        super().resume_writing()

    def data_received(self, data: bytes) -> None:
        """Parse the bytes that came. Mistakes in them are answered, never raised."""
        if self._refused:
            return
        self._unset_keepalive_if_required()
        self._unparsed += data
        self._parse()

    def eof_received(self) -> bool:  # type: ignore[override]
        """Close, unless the client waits for an answer: it may only have said all that it has to say."""
        awaits = not self._refused and self._awaits_answer() and self.cycle.scope["http_version"] == "1.1"
        if awaits and not self._ended:
            self._ended = True
            ask_while_unanswered(self.cycle, self.loop)
        return awaits

    def on_message_begin(self) -> None:
        """A request line begins."""
        if self._awaits_answer():
            raise MalformedError("A request begins before the one before it has ended.")
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
        value = value.strip(b" \t")
        if not self._in_body and is_read(name.lower(), value):
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        """Hand the request to the application."""
        if self.parser.should_upgrade():
            if self.parser.get_method() == b"CONNECT":
                raise MalformedError("This is no proxy.")
            self._in_upgrade = True
            return
        version = self.parser.get_http_version()
        check_version(version)
        check_host(version, self.headers)
        self._framer.begin_body(body_bytes(version, self.headers))
        self._check_place()
        self._stop_timer()
        self._silent_bytes = 0
        self.expect_100_continue &= version == "1.1"
        super().on_headers_complete()
        self._answer = AnswerTransport(self.transport, self.leave)
        self.cycle.transport = self._answer  # type: ignore[assignment]
        self.idle.pop(self, None)
        self._in_head, self._in_body = False, True

    def on_body(self, body: bytes) -> None:
        """Part of the body."""
        self._silent_bytes = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        """The body is complete."""
        if self._in_upgrade:
            return
        self._framer.begin_head()
        self._in_body = False
        self._silent_bytes = 0
        self._stop_timer()
        super().on_message_complete()
        if self._ended:
            ask_while_unanswered(self.cycle, self.loop)

    def on_response_complete(self) -> None:
        """Parse the bytes that have come since, or wait for more."""
        self._answer.flush()
        super().on_response_complete()
        if self._refused or self.transport.is_closing():
            self._unset_keepalive_if_required()
        elif self._unparsed:
            self._parse()
        elif self._ended:
            self.transport.close()
        else:
            self._await_request()

    def shutdown(self) -> None:
        """Close once the request in flight is answered. A refused connection closes by itself."""
        if not self._refused:
            super().shutdown()

    def give_up(self) -> None:
        """Close now, unless an answer can still be begun."""
        if self._is_idle() or self.cycle.response_started:
            self.transport.abort()

    def leave(self) -> None:
        """Close once the answer is sent. A client that is still sending gets time to read it."""
        if not self._in_body:
            self.transport.close()
        elif not self._refused:
            self._linger()

    def _parse(self) -> None:
        """Parse the waiting bytes, up to the end of a request that must be answered first."""
        data, at = self._unparsed, 0
        self._unparsed = b""
        for _ in range(_PIECES_A_TURN):
            if at == len(data) or self._refused or self._awaits_answer() or self.transport.is_closing():
                break
            try:
                end = self._framer.cut(data, at)
                self._silent_bytes += end - at
                self._feed(data[at:end])
                at = end
            except (httptools.HttpParserError, VersionError) as exc:
                self._refuse_bytes(exc)
        if self._refused or self.transport.is_closing():
            return
        self._unparsed = data[at:]
        self._hold()
        if self._silent_bytes > MAX_HEAD_BYTES:
            self._refuse(_too_large())
        elif self._is_idle() and self._timer is None:
            self._await_request()

    def _hold(self) -> None:
        """Read no more while there is something that could not be parsed."""
        assert isinstance(self.flow, HeldFlow)
        self.flow.is_held = bool(self._unparsed)
        if not self._unparsed:
            if not self._in_body or self._is_idle():
                self.flow.resume_reading()
            return
        self.flow.pause_reading()
        if not self._awaits_answer():
            self.loop.call_soon(self._parse)

    def _feed(self, piece: bytes) -> None:
        """Parse; a request to change the protocol is taken as if it were none, which HTTP allows.

        Java's client, for one, offers HTTP/2 with its first request. The parser would stop there and
        lose the request's body, and with it the connection.
        """
        try:
            self.parser.feed_data(piece)
        except httptools.HttpParserUpgrade:
            self._in_upgrade = False
            version = self.parser.get_http_version().encode()
            lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
            lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
            self.parser = httptools.HttpRequestParser(self)
            self.parser.feed_data(b"\r\n".join((*lines, b"", b"")))

    def _await_request(self) -> None:
        """Wait between requests: briefly for the rest of one that has begun, longer for the next one."""
        self._unset_keepalive_if_required()
        if self._in_head or self._in_body:
            self._start_timer(self.header_timeout_s)
        else:
            self.idle[self] = None
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

    def _is_idle(self) -> bool:
        return self.cycle is None or self.cycle.response_complete

    def _awaits_answer(self) -> bool:
        """Whether a request is complete and not answered: the one after it has to wait."""
        return not self._is_idle() and not self._in_body

    def _check_head(self) -> None:
        if self._head_bytes > MAX_HEAD_BYTES or self._num_headers > MAX_HEADERS:
            raise _too_large()

    def _check_place(self) -> None:
        """Refuse requests other than probes while there are too many connections."""
        self._is_spare &= len(self.connections) > self.max_connections
        if self._is_spare and self.url.partition(b"?")[0].decode("latin-1") not in PUBLIC_PATHS:
            self._count("limit")
            raise UnavailableError(
                f"The service has {self.max_connections} connections, the most that it takes.",
                {"Retry-After": str(self.retry_after_s)},
            )

    def _close_longest_idle(self) -> bool:
        connection = next(iter(self.idle), None)
        if connection is None:
            return False
        del self.idle[connection]
        connection._count("idle")
        connection.transport.close()
        return True

    def _refuse_bytes(self, error: httptools.HttpParserError | VersionError) -> None:
        cause = error if isinstance(error, VersionError) else error.__context__
        if isinstance(cause, ServiceError):
            self._refuse(cause)
        elif str(error).startswith(_FOREIGN_VERSION):
            self._refuse(VersionError("This version of HTTP is not spoken here: send HTTP/1.1."))
        else:  # a target that is no URL reaches us as the parser's error as well
            self._refuse(MalformedError("This is not HTTP/1.1."))

    def _refuse(self, error: ServiceError) -> None:
        """Answer, unless an earlier answer is under way, and read no more."""
        self._stop_timer()
        if isinstance(error, HeadersTooLargeError):
            self._count("header-bytes")
        if not self._in_body:
            self._say(error)
        elif self._is_idle() or self.cycle.response_started:  # its answer is out, or on its way
            self._refused = True
            self.transport.close()
        else:  # its application learns that the client went away
            self.cycle.disconnected = True
            self.cycle.waiting_for_100_continue = False  # nothing may be written after what is said now
            self.cycle.message_event.set()
            self._say(error)

    def _say(self, error: ServiceError) -> None:
        self.transport.write(problem_message(error))
        self._linger()

    def _linger(self) -> None:
        """Read no more and let the client read; then close."""
        self._refused = True
        self._unparsed = b""
        self.idle.pop(self, None)
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
        if self._refused or self._in_body:
            self.transport.abort()
            return
        self._count("header-timeout")
        if self._in_head or self._silent_bytes:
            self._say(RequestTimeoutError(f"The head of the request took over {self.header_timeout_s:g} s."))
        else:  # it never said anything
            self.transport.abort()

    def _count(self, reason: str) -> None:
        self.metrics.rejected_connections.labels(reason).inc()


def protocol_class(settings: Settings, metrics: Metrics) -> type[asyncio.Protocol]:
    """The protocol with a server's bounds, for ``uvicorn.Config(http=...)``."""
    bounds: dict[str, Any] = {
        "metrics": metrics,
        "max_connections": settings.max_connections,
        "header_timeout_s": settings.header_timeout_s,
        "answer_timeout_s": settings.answer_timeout_s,
        "retry_after_s": settings.retry_after_s,
        "idle": {},
    }
    return type("BoundedHttpProtocol", (BoundedHttpProtocol,), bounds)


def _too_large() -> HeadersTooLargeError:
    return HeadersTooLargeError(
        f"The request line and headers are larger than {MAX_HEAD_BYTES} bytes or {MAX_HEADERS} headers."
    )
