"""The outermost layer: request ids, timing, metrics, and a problem document for what nobody caught."""

import logging
import re
import time
import uuid
from collections.abc import Collection

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from service.context import RequestContext
from service.errors import problem_response
from service.metrics import Metrics

logger = logging.getLogger(__name__)

REQUEST_ID_HEADER = "X-Request-ID"
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:+/=-]{1,128}")
_OTHER_ROUTE = "other"


class RequestMiddleware:
    """Pure ASGI, so that bodies stream through untouched.

    Args:
        app: what it wraps.
        request_timeout_s: deadline of a request.
        metrics: where requests are counted.
        routes: paths that are counted by name; the rest counts as ``other``.
    """

    def __init__(
        self, app: ASGIApp, request_timeout_s: float, metrics: Metrics, routes: Collection[str]
    ) -> None:
        self._app = app
        self._request_timeout_s = request_timeout_s
        self._metrics = metrics
        self._routes = frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        context = RequestContext(
            request_id=usable_request_id(Headers(scope=scope).get(REQUEST_ID_HEADER)),
            deadline_s=time.monotonic() + self._request_timeout_s,
        )
        scope.setdefault("state", {})["context"] = context
        status = 0

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                headers[REQUEST_ID_HEADER] = context.request_id
                headers["Server-Timing"] = context.server_timing()
            await send(message)

        with self._metrics.requests_in_flight.track_inprogress():
            try:
                await self._app(scope, receive, send_with_headers)
            except Exception as exc:  # the request's boundary
                if status:
                    raise  # an answer has begun: all that is left is to cut the connection
                await problem_response(exc, context)(scope, receive, send_with_headers)
        self._record(scope, context, status)

    def _record(self, scope: Scope, context: RequestContext, status: int) -> None:
        path = scope["path"]
        route = path if path in self._routes else _OTHER_ROUTE
        self._metrics.requests.labels(route, context.outcome).inc()
        self._metrics.request_seconds.labels(route).observe(context.elapsed_s())
        level = logging.INFO if scope["method"] == "POST" or status >= 500 else logging.DEBUG
        logger.log(
            level,
            "%s %s %d %s %.1f ms id=%s",
            scope["method"],
            route,
            status,
            context.outcome,
            context.elapsed_s() * 1000,
            context.request_id,
        )


def usable_request_id(proposed: str | None) -> str:
    """The client's id where it is short and plain, else a fresh one."""
    if proposed is not None and _REQUEST_ID.fullmatch(proposed):
        return proposed
    return uuid.uuid4().hex
