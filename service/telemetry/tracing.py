"""Distributed traces of requests, by OpenTelemetry (the extra ``drorae[otel]``).

A request becomes one server span, under the trace that its client names (W3C trace context) or under a fresh
one, with one child per stage that its context recorded. Spans are sent in the background, from a bounded
queue: a collector that is slow or gone costs spans, never requests.
"""

import logging
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from service.errors import StartError
from service.telemetry.context import RequestContext, random_bits

if TYPE_CHECKING:
    from opentelemetry.sdk.trace.export import BatchSpanProcessor
    from opentelemetry.sdk.trace.id_generator import IdGenerator
    from opentelemetry.trace import Span

logger = logging.getLogger(__name__)

TRACE_HEADERS = ("traceparent", "tracestate")
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
    """Facts of a finished request that its context lacks.

    Attributes:
        method: the HTTP method.
        path: of the request, without the query.
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


class Tracing:
    """Begins and ends the spans of requests, and sends them to a collector where there is one.

    Args:
        endpoint: base address of an OTLP/HTTP collector, such as ``http://collector:4318``. Without one,
            spans have ids and are not recorded.
        version: of this service.

    Raises:
        ImportError: the extra is not installed.
    """

    def __init__(self, endpoint: str, version: str) -> None:
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON, ParentBased
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        provider = TracerProvider(
            ParentBased(ALWAYS_ON if endpoint else ALWAYS_OFF),
            Resource.create({"service.name": "drorae", "service.version": version}),
            shutdown_on_exit=False,
            id_generator=_unseeded_ids(),
        )
        self._processor = _exporting(endpoint) if endpoint else None
        if self._processor is not None:
            provider.add_span_processor(self._processor)
        self._tracer = provider.get_tracer("drorae", version)
        self._propagator = TraceContextTextMapPropagator()

    def begin(self, context: RequestContext, headers: Mapping[str, Sequence[str]]) -> None:
        """Give a request its span, and the headers that name it to others.

        Args:
            context: of the request.
            headers: all values of each of `TRACE_HEADERS`. A trace begins where ``traceparent`` is not one
                valid value.
        """
        from opentelemetry.context import Context
        from opentelemetry.trace import SpanKind, set_span_in_context

        received = headers if len(headers["traceparent"]) == 1 else {}
        parent = self._propagator.extract(received, Context())
        context.span = self._tracer.start_span("request", parent, SpanKind.SERVER)
        self._propagator.inject(context.trace_headers, set_span_in_context(context.span, Context()))

    def end(self, context: RequestContext, request: FinishedRequest) -> None:
        """End the span of a request that is over, with one child per stage."""
        from opentelemetry.trace import StatusCode, set_span_in_context

        span = context.span
        if span is None or not span.is_recording():
            return
        end_ns, now_s = time.time_ns(), time.monotonic()

        def wall_ns(moment_s: float) -> int:
            return end_ns - round((now_s - moment_s) * 1e9)

        parent = set_span_in_context(span)
        for stage, started_s, duration_s in context.stages:
            child = self._tracer.start_span(stage, parent, start_time=wall_ns(started_s))
            child.end(wall_ns(started_s + duration_s))
        span.update_name(f"{request.method} {request.route}".rstrip())
        span.set_attributes(_attributes(context, request))
        if _failed(request):
            span.set_status(StatusCode.ERROR)
        span.end(end_ns)

    def close(self) -> None:
        """Send what is queued, for at most `FLUSH_TIMEOUT_S`; blocks."""
        if self._processor is None:
            return
        flush = threading.Thread(target=self._processor.shutdown, name="drorae-spans", daemon=True)
        flush.start()
        flush.join(FLUSH_TIMEOUT_S)
        if flush.is_alive():
            logger.warning("the last spans could not be sent within %g s and are lost", FLUSH_TIMEOUT_S)
            self._processor.span_exporter.shutdown()  # breaks off the waiting between attempts


def find_tracing(endpoint: str, version: str) -> Tracing | None:
    """Tracing as the settings have it; None where the extra is not installed.

    Raises:
        StartError: there is a collector, and the extra is not installed.
    """
    try:
        return Tracing(endpoint, version)
    except ImportError as exc:
        if endpoint:
            raise StartError("otlp_endpoint is set, which needs: pip install drorae[otel]") from exc
        return None


def trace_ids(span: "Span") -> dict[str, str]:
    """The ids of a span as the log has them: 32 and 16 hexadecimal digits."""
    own = span.get_span_context()
    return {"trace_id": f"{own.trace_id:032x}", "span_id": f"{own.span_id:016x}"}


def _unseeded_ids() -> "IdGenerator":
    """Ids that stay unique where a program seeds the module `random`."""
    from opentelemetry.sdk.trace.id_generator import IdGenerator

    class Ids(IdGenerator):
        def generate_span_id(self) -> int:
            return random_bits(64)

        def generate_trace_id(self) -> int:
            return random_bits(128)

    return Ids()


def _exporting(endpoint: str) -> "BatchSpanProcessor":
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    url = endpoint.rstrip("/")
    exporter = OTLPSpanExporter(
        url if url.endswith(TRACES_PATH) else url + TRACES_PATH, timeout=_SEND_TIMEOUT_S
    )
    return BatchSpanProcessor(
        exporter,
        max_queue_size=_QUEUE_SPANS,
        max_export_batch_size=_BATCH_SPANS,
        schedule_delay_millis=_SEND_INTERVAL_S * 1000,
    )


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
