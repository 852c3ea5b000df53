"""Export of requests as OpenTelemetry spans (the extra ``drorae[otel]``).

A request becomes one server span, whose ids are those of its answer's ``traceparent``, and one child
for each stage that its context recorded. Spans are made once the request is over and sent in the
background, from a bounded queue: a collector that is slow or gone costs spans, never requests.
"""

import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.errors import StartError
from service.telemetry.context import RequestContext
from service.telemetry.tracing import random_hex

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import ReadableSpan
    from opentelemetry.trace import SpanContext

logger = logging.getLogger(__name__)

TRACES_PATH = "/v1/traces"
FLUSH_TIMEOUT_S = 5.0
"""How long a stopping service waits for its last spans to be sent."""

_QUEUE_SPANS = 8192
_BATCH_SPANS = 512
_SEND_TIMEOUT_S = 5.0
_SEND_INTERVAL_S = 2.0
_MAX_PATH_CHARS = 256


@dataclass(frozen=True, slots=True)
class FinishedRequest:
    """What is known of a request once it is over, beyond its context.

    Attributes:
        method: the HTTP method.
        path: what the client asked for, without the query.
        route: the route's path, empty where there is none.
        http_version: such as ``1.1``.
        status: of the answer, 0 where none was begun.
        bytes_in: read of the body.
        bytes_out: sent of the answer's body.
    """

    method: str
    path: str
    route: str
    http_version: str
    status: int
    bytes_in: int
    bytes_out: int


class SpanExport:
    """Sends requests to a collector.

    Args:
        endpoint: base address of an OTLP/HTTP collector, such as ``http://collector:4318``.
        version: of this service.

    Raises:
        StartError: the extra is not installed.
    """

    def __init__(self, endpoint: str, version: str) -> None:
        try:
            from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
            from opentelemetry.sdk.resources import Resource
            from opentelemetry.sdk.trace.export import BatchSpanProcessor
            from opentelemetry.sdk.util.instrumentation import InstrumentationScope
        except ImportError as exc:
            raise StartError("otlp_endpoint is set, which needs: pip install drorae[otel]") from exc
        url = endpoint.rstrip("/")
        self._exporter = OTLPSpanExporter(
            url if url.endswith(TRACES_PATH) else url + TRACES_PATH, timeout=_SEND_TIMEOUT_S
        )
        self._processor = BatchSpanProcessor(
            self._exporter,
            max_queue_size=_QUEUE_SPANS,
            max_export_batch_size=_BATCH_SPANS,
            schedule_delay_millis=_SEND_INTERVAL_S * 1000,
        )
        self._resource = Resource.create({"service.name": "drorae", "service.version": version})
        self._scope = InstrumentationScope("drorae", version)

    def add(self, context: RequestContext, request: FinishedRequest) -> None:
        """Queue the spans of a request that has just ended, unless its client does not sample the trace."""
        if not context.trace.sampled:
            return
        for span in self._spans(context, request):
            self._processor.on_end(span)

    def close(self) -> None:
        """Send what is queued, for at most `FLUSH_TIMEOUT_S`; blocks."""
        flush = threading.Thread(target=self._processor.shutdown, name="drorae-spans", daemon=True)
        flush.start()
        flush.join(FLUSH_TIMEOUT_S)
        if flush.is_alive():
            logger.warning("the last spans could not be sent within %g s and are lost", FLUSH_TIMEOUT_S)
            self._exporter.shutdown()  # breaks off the waiting between attempts

    def _spans(self, context: RequestContext, request: FinishedRequest) -> "list[ReadableSpan]":
        """Built as finished: the SDK's tracer would draw ids of its own, and cost the request its time."""
        from opentelemetry.sdk.trace import ReadableSpan
        from opentelemetry.trace import SpanKind, Status, StatusCode

        own = _span_context(context.trace.trace_id, context.trace.span_id)
        parent_id = context.trace.parent_id
        end_ns, now_s = time.time_ns(), time.monotonic()

        def wall_ns(moment_s: float) -> int:
            return end_ns - round((now_s - moment_s) * 1e9)

        spans = [
            ReadableSpan(
                stage,
                context=_span_context(context.trace.trace_id, random_hex(16)),
                parent=own,
                resource=self._resource,
                instrumentation_scope=self._scope,
                attributes={},
                start_time=wall_ns(started_s),
                end_time=wall_ns(started_s + duration_s),
            )
            for stage, started_s, duration_s in context.stages
        ]
        spans.append(
            ReadableSpan(
                f"{request.method} {request.route}".rstrip(),
                context=own,
                parent=_span_context(context.trace.trace_id, parent_id, remote=True) if parent_id else None,
                resource=self._resource,
                instrumentation_scope=self._scope,
                attributes=_attributes(context, request),
                kind=SpanKind.SERVER,
                status=Status(StatusCode.ERROR if _failed(request) else StatusCode.UNSET),
                start_time=wall_ns(context.started_s),
                end_time=end_ns,
            )
        )
        return spans


def _span_context(trace_id: str, span_id: str, remote: bool = False) -> "SpanContext":
    from opentelemetry.trace import SpanContext, TraceFlags

    return SpanContext(int(trace_id, 16), int(span_id, 16), remote, TraceFlags(TraceFlags.SAMPLED))


def _failed(request: FinishedRequest) -> bool:
    return request.status == 0 or request.status >= 500


def _attributes(context: RequestContext, request: FinishedRequest) -> Mapping[str, str | int]:
    """The stable names of OpenTelemetry's HTTP conventions, and our own; nothing that identifies a client."""
    attributes: dict[str, str | int] = {
        "http.request.method": request.method,
        "url.scheme": "http",
        "url.path": request.path[:_MAX_PATH_CHARS],
        "network.protocol.version": request.http_version,
        "http.request.body.size": request.bytes_in,
        "http.response.body.size": request.bytes_out,
        "drorae.outcome": context.outcome,
        "drorae.request_id": context.request_id,
    }
    if request.route:
        attributes["http.route"] = request.route
    if request.status:
        attributes["http.response.status_code"] = request.status
    if _failed(request):
        attributes["error.type"] = context.outcome
    return attributes
