"""The outermost layers of the application, pure ASGI, so that bodies stream through untouched.

`RequestMiddleware` knows every request: its id, trace, time, bytes and outcome. `GateMiddleware`,
inside it, turns away who has no key, sets the deadline, and is the boundary of unexpected errors.
Cross-origin rules stand between the two, so that refusals and failures have their headers as well.
"""

import asyncio
import functools
import logging
import re
import time
from collections.abc import Awaitable, Callable, Collection, Iterator, Mapping

from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.errors import InternalError, OptionError, PreflightError, UnauthorizedError, UnavailableError
from service.http.keys import ApiKeys
from service.http.problems import problem_response
from service.telemetry.context import RequestContext, random_bits
from service.telemetry.metrics import Metrics
from service.telemetry.tracing import TRACE_HEADERS, FinishedRequest, Tracing, trace_ids

logger = logging.getLogger(__name__)

Handler = Callable[[Request], Awaitable[Response]]

REQUEST_ID_HEADER = "X-Request-ID"
TIMEOUT_HEADER = "X-Request-Timeout"
TIMEOUT_PATTERN = r"^(?=.*[1-9])[0-9]{1,15}(\.[0-9]{1,15})?$"
"""Positive seconds, as the header writes them."""

PUBLIC_PATHS = frozenset({"/livez", "/readyz"})
"""Paths of probes, which need no key."""

_PAGES = re.compile(r"/|/page/.*|/docs(/.*)?")
"""Paths of static pages, which hold nothing that is not public and ask for a key themselves."""

SLICE_BYTES = 64 * 1024

_REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")
_TIMEOUT = re.compile(TIMEOUT_PATTERN)
_OTHER_ROUTE = "other"
_REQUEST_ID_NAME, _TIMEOUT_NAME = REQUEST_ID_HEADER.lower().encode(), TIMEOUT_HEADER.lower().encode()
_NO_STORE = (b"cache-control", b"no-store")
_OF_A_BODY = frozenset({"content-length", "content-type"})
_CLOSE = (b"connection", b"close")
_NO_SNIFFING = (b"x-content-type-options", b"nosniff")


class RequestMiddleware:
    """Gives every request its context and every answer its headers; counts, logs and traces.

    Args:
        app: the wrapped application.
        request_timeout_s: deadline of a request, until the gate sets another.
        metrics: where requests are counted.
        routes: paths that are counted by name; all others count as ``other``.
        tracing: begins and ends the spans of requests.
        is_closing: whether the service is about to end, so that connections should not be used again.
    """

    def __init__(
        self,
        app: ASGIApp,
        request_timeout_s: float,
        metrics: Metrics,
        routes: Collection[str],
        tracing: Tracing | None = None,
        is_closing: Callable[[], bool] = lambda: False,
    ) -> None:
        self._app = app
        self._request_timeout_s = request_timeout_s
        self._metrics = metrics
        self._routes = frozenset(routes)
        self._tracing = tracing
        self._is_closing = is_closing
        # Looking a series up by its labels takes as long as counting in it.
        self._seconds, self._bytes_in, self._bytes_out = (
            functools.cache(histogram.labels)
            for histogram in (metrics.request_seconds, metrics.request_bytes, metrics.response_bytes)
        )

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.monotonic()
        context = RequestContext(
            request_id=usable_request_id(header_values(scope, _REQUEST_ID_NAME)),
            deadline_s=started_s + self._request_timeout_s,
            started_s=started_s,
        )
        if self._tracing is not None:
            self._tracing.begin(
                context, {name: header_values(scope, name.encode()) for name in TRACE_HEADERS}
            )
        scope.setdefault("state", {})["context"] = context
        status = bytes_in = bytes_out = 0

        async def counting_receive() -> Message:
            nonlocal bytes_in
            message = await receive()
            bytes_in += len(message.get("body", b""))
            return message

        async def send_with_headers(message: Message) -> None:
            nonlocal status, bytes_out
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = _complete_headers(list(message.get("headers", ())), context)
                if self._is_closing():
                    message["headers"].append(_CLOSE)
                await send(message)
                return
            bytes_out += len(message.get("body", b""))
            for part in _in_slices(message):
                await send(part)

        self._metrics.requests_in_flight.inc()
        try:
            await self._app(scope, counting_receive, send_with_headers)
        except (Exception, asyncio.CancelledError):
            context.outcome = InternalError.slug  # an answer that was begun or abandoned: uvicorn closes
            raise
        finally:
            context.resources.close()
            self._metrics.requests_in_flight.dec()
            route = scope["path"] if scope["path"] in self._routes else ""
            version = scope.get("http_version", "1.1")
            request = FinishedRequest(
                scope["method"], scope["path"], route, version, status, bytes_in, bytes_out
            )
            self._record(context, request)

    def _record(self, context: RequestContext, request: FinishedRequest) -> None:
        route = request.route or _OTHER_ROUTE
        duration_s = context.elapsed_s()
        self._metrics.requests.labels(route, context.outcome).inc()
        self._seconds(route).observe(duration_s)
        if request.route and request.method == "POST":
            self._bytes_in(route).observe(request.bytes_in)
            self._bytes_out(route).observe(request.bytes_out)
        noteworthy = request.method == "POST" or request.status >= 500
        level = logging.INFO if noteworthy and request.path not in PUBLIC_PATHS else logging.DEBUG
        if logger.isEnabledFor(level):
            _log_access(level, context, request, route, duration_s)
        if self._tracing is not None:
            self._tracing.end(context, request)


class GateMiddleware:
    """Decides, before the body is read, who may come in and until when.

    Args:
        app: the wrapped application.
        keys: the keys that clients need.
        max_request_timeout_s: longest deadline that a request can ask for.
        retry_after_s: sent to requests that are not done when the service stops.
    """

    def __init__(self, app: ASGIApp, keys: ApiKeys, max_request_timeout_s: float, retry_after_s: int) -> None:
        self._app = app
        self._keys = keys
        self._max_request_timeout_s = max_request_timeout_s
        self._stopped_headers = {"Retry-After": str(retry_after_s), "Connection": "close"}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context: RequestContext = scope["state"]["context"]
        begun = False

        async def noting_send(message: Message) -> None:
            nonlocal begun
            begun = True
            await send(message)

        try:
            self._check(scope, context)
            await self._app(scope, receive, noting_send)
        except asyncio.CancelledError:  # the service stops
            if begun:
                raise
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
            stopped = UnavailableError("The service stopped before this was done.", self._stopped_headers)
            await problem_response(stopped, context)(scope, receive, send)
        except Exception as exc:  # the request's boundary
            if begun:
                raise
            await problem_response(exc, context)(scope, receive, send)

    def _check(self, scope: Scope, context: RequestContext) -> None:
        if (
            self._keys.required
            and scope["path"] not in PUBLIC_PATHS
            and not (scope["method"] in ("GET", "HEAD") and _PAGES.fullmatch(scope["path"]))
            and not self._keys.allow([value for name, value in scope["headers"] if name == b"authorization"])
        ):
            raise UnauthorizedError("This needs a key that is known here, as 'Authorization: Bearer KEY'.")
        if scope["method"] == "POST":
            asked = header_values(scope, _TIMEOUT_NAME)
            if asked:
                timeout_s = min(parse_timeout_s(asked), self._max_request_timeout_s)
                context.deadline_s = context.started_s + timeout_s


class ShortcutMiddleware:
    """Finds handlers by method and path in a table. Starlette's router behind it has all other requests.

    The router tries one route after the other and wraps a handler in three layers: an eighth of the event
    loop's time for a single photo.

    Args:
        app: the wrapped application.
        handlers: of routes whose path is fixed, by method and path.
    """

    def __init__(self, app: ASGIApp, handlers: Mapping[tuple[str, str], Handler]) -> None:
        self._app = app
        self._handlers = handlers

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        is_direct = scope["type"] == "http" and not scope.get("root_path")
        handler = self._handlers.get((scope["method"], scope["path"])) if is_direct else None
        if handler is None:
            await self._app(scope, receive, send)
            return
        response = await handler(Request(scope, receive, send))
        await response(scope, receive, send)


class CrossOriginMiddleware(CORSMiddleware):
    """Starlette's cross-origin rules, with refusals as problem documents."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        except PreflightError as exc:
            await problem_response(exc, scope["state"]["context"])(scope, receive, send)

    def preflight_response(self, request_headers: Headers) -> Response:
        """Answer the question that a page asks before it sends a request.

        Raises:
            PreflightError: its origin, its method or a header is not allowed.
        """
        response = super().preflight_response(request_headers)
        if response.status_code >= 400:
            headers = {name: value for name, value in response.headers.items() if name not in _OF_A_BODY}
            raise PreflightError(bytes(response.body).decode(), headers)
        return response


def header_values(scope: Scope, name: bytes) -> list[str]:
    """Values of all headers of a name, which is in lower case."""
    return [value.decode("latin-1") for key, value in scope["headers"] if key == name]


def usable_request_id(proposed: list[str]) -> str:
    """The client's id where it sent one that is short and plain, else a fresh one."""
    if len(proposed) == 1 and _REQUEST_ID.fullmatch(proposed[0]):
        return proposed[0]
    return f"{random_bits(128):032x}"


def parse_timeout_s(values: list[str]) -> float:
    """Seconds that ``X-Request-Timeout`` asks for.

    Raises:
        OptionError: several headers, or not a positive decimal number.
    """
    if len(values) != 1 or not _TIMEOUT.fullmatch(values[0]):
        raise OptionError(f"The header {TIMEOUT_HEADER} must be one positive decimal number of seconds.")
    return float(values[0])


def _in_slices(message: Message) -> Iterator[Message]:
    """Cut a part of an answer, so that each slice is sent once the client has read enough of the last one.

    Sent at once, a large one would lie in the connection's buffer after its request has ended, uncounted.
    """
    body, more_body = message.get("body", b""), message.get("more_body", False)
    if len(body) <= SLICE_BYTES:
        yield message
        return
    for start in range(0, len(body), SLICE_BYTES):
        end = start + SLICE_BYTES
        yield {**message, "body": body[start:end], "more_body": more_body or end < len(body)}


def _complete_headers(
    headers: list[tuple[bytes, bytes]], context: RequestContext
) -> list[tuple[bytes, bytes]]:
    headers += (
        (_REQUEST_ID_NAME, context.request_id.encode()),
        (b"server-timing", context.server_timing().encode()),
        _NO_SNIFFING,
    )
    headers += ((name.encode(), value.encode()) for name, value in context.trace_headers.items())
    if not any(name == b"cache-control" for name, _ in headers):
        headers.append(_NO_STORE)
    return headers


def _log_access(
    level: int, context: RequestContext, request: FinishedRequest, route: str, duration_s: float
) -> None:
    fields = {
        "method": request.method,
        "route": route,
        "status": request.status,
        "outcome": context.outcome,
        "duration_ms": round(duration_s * 1000, 3),
        "request_id": context.request_id,
        "bytes_in": request.bytes_in,
        "bytes_out": request.bytes_out,
    }
    if context.span is not None:
        fields |= trace_ids(context.span)
    logger.log(
        level,
        "%s %s %d %s %.1f ms id=%s",
        *(request.method, route, request.status, context.outcome, duration_s * 1000, context.request_id),
        extra=fields,
    )
