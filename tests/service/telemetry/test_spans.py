"""Requests arrive at a collector as spans; a collector that is gone costs nothing but the spans."""

import json
import logging
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest

from drorae_client import Client, ServiceError
from model.tokenizer import Tokenizer
from service.app import create_app
from service.errors import StartError
from service.settings import Settings
from service.telemetry import tracing
from service.telemetry.context import RequestContext
from service.telemetry.logs import JsonFormatter
from service.telemetry.tracing import FinishedRequest, Tracing

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"


class Collector:
    """Receives OTLP over HTTP."""

    def __init__(self) -> None:
        self.resources: list[dict[str, Any]] = []
        self.spans: list[Any] = []
        self.paths: list[str] = []
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                collector.receive(self.path, body)
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()

            def log_message(self, *_: Any) -> None: ...

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def receive(self, path: str, body: bytes) -> None:
        from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

        self.paths.append(path)
        for group in ExportTraceServiceRequest.FromString(body).resource_spans:
            self.resources.append(values(group.resource.attributes))
            for scope in group.scope_spans:
                self.spans += scope.spans

    def named(self, name: str) -> Any:
        [found] = [span for span in self.spans if span.name == name]
        return found


def values(attributes: Any) -> dict[str, Any]:
    return {
        entry.key: getattr(entry.value, entry.value.WhichOneof("value") or "string_value")
        for entry in attributes
    }


@pytest.fixture
def collector() -> Iterator[Collector]:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    collector = Collector()
    thread = threading.Thread(target=collector.server.serve_forever)
    thread.start()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()
    thread.join(30)


def test_requests_arrive(
    serve: Callable[..., Any], tokenizer: Tokenizer, png: bytes, collector: Collector
) -> None:
    before_ns = time.time_ns()
    with serve(create_app(Settings(otlp_endpoint=collector.url), tokenizer)) as running:
        client = running.client
        parent = {"traceparent": f"00-{TRACE}-{SPAN}-01"}
        encoded = client.post("/encode", content=png, headers={**parent, "X-Request-ID": "mine"})
        refused = client.post("/decode", content=b"x")
        unsampled = client.post("/reconstruct", content=png, headers={"traceparent": f"00-{TRACE}-{SPAN}-00"})
        lost = client.get("/nowhere")
    # The server has stopped, and flushed what it had.
    assert set(collector.paths) == {"/v1/traces"}
    assert all(resource["service.name"] == "drorae" for resource in collector.resources)

    span = collector.named("POST /encode")
    assert f"00-{span.trace_id.hex()}-{span.span_id.hex()}-01" == encoded.headers["traceparent"]
    assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, SPAN)
    assert span.kind == 2  # server
    assert before_ns < span.start_time_unix_nano < span.end_time_unix_nano < time.time_ns()
    assert span.status.code == 0
    assert values(span.attributes) == {
        "http.request.method": "POST",
        "http.route": "/encode",
        "http.response.status_code": 200,
        "http.request.body.size": len(png),
        "http.response.body.size": len(encoded.content),
        "url.scheme": "http",
        "url.path": "/encode",
        "network.protocol.version": "1.1",
        "drorae.outcome": "ok",
        "drorae.request_id": "mine",
    }

    stages = [child for child in collector.spans if child.parent_span_id == span.span_id]
    timed = [entry.split(";")[0] for entry in encoded.headers["server-timing"].split(", ")]
    assert {stage.name for stage in stages} == set(timed) - {"total"}
    for stage in stages:
        assert stage.trace_id == span.trace_id
        assert stage.start_time_unix_nano >= span.start_time_unix_nano - 1000
        assert stage.end_time_unix_nano <= span.end_time_unix_nano

    span = collector.named("POST /decode")
    assert f"00-{span.trace_id.hex()}-{span.span_id.hex()}-01" == refused.headers["traceparent"]
    assert span.parent_span_id == b""
    assert values(span.attributes)["drorae.outcome"] != "ok"
    assert collector.named("GET").attributes
    assert lost.status_code == 404

    assert unsampled.headers["traceparent"].endswith("-00")
    assert not [span for span in collector.spans if span.name == "POST /reconstruct"]
    assert len({span.span_id for span in collector.spans}) == len(collector.spans)


def test_client_log_and_trace_name_the_same_id(
    serve: Callable[..., Any],
    tokenizer: Tokenizer,
    png: bytes,
    collector: Collector,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The id that the client prints with an error, or returns with a result, finds log line and trace."""
    app = create_app(Settings(otlp_endpoint=collector.url), tokenizer)
    with caplog.at_level(logging.INFO), serve(app) as running, Client(str(running.client.base_url)) as client:
        encoded = client.encode(png)
        with pytest.raises(ServiceError) as caught:
            client.decode(np.zeros((1, 3, 2, 2), np.float16))
    for request_id, status in ((encoded.request_id, 200), (caught.value.request_id, 422)):
        [line] = [record for record in caplog.records if getattr(record, "request_id", "") == request_id]
        fields = json.loads(JsonFormatter().format(line))
        assert (fields["request_id"], fields["status"]) == (request_id, status)
        [span] = [
            span for span in collector.spans if span.trace_id.hex() == fields["trace_id"] and span.kind == 2
        ]
        assert span.span_id.hex() == fields["span_id"]
        assert values(span.attributes)["drorae.request_id"] == request_id
    assert f"[request {caught.value.request_id}]" in str(caught.value)


def test_failures_are_marked(collector: Collector) -> None:
    tracing = Tracing(collector.url + "/v1/traces", "1")
    for status, outcome in ((500, "internal"), (0, "internal"), (429, "queue-full")):
        context = RequestContext("x", 0.0, outcome=outcome)
        tracing.begin(context, {"traceparent": []})
        tracing.end(context, FinishedRequest("POST", "/x" * 500, "", "1.1", status, 0, 0))
    tracing.close()
    assert collector.paths == ["/v1/traces"]
    attributes = [values(span.attributes) for span in collector.spans]
    assert [span.status.code for span in collector.spans] == [2, 2, 0]
    assert [entry.get("error.type") for entry in attributes] == ["internal", "internal", None]
    assert all(len(entry["url.path"]) == 256 for entry in attributes)


def test_a_collector_that_is_gone(
    serve: Callable[..., Any], tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("opentelemetry.exporter.otlp.proto.http")
    monkeypatch.setattr(tracing, "FLUSH_TIMEOUT_S", 0.2)
    monkeypatch.setattr(tracing, "_QUEUE_SPANS", 4)
    monkeypatch.setattr(tracing, "_BATCH_SPANS", 2)
    with socket.create_server(("127.0.0.1", 0)) as probe:
        address = f"http://127.0.0.1:{probe.getsockname()[1]}"
    with serve(create_app(Settings(otlp_endpoint=address), tokenizer)) as running:
        for _ in range(20):
            assert running.client.get("/livez").status_code == 200
        began_s = time.monotonic()
    assert time.monotonic() - began_s < 10


def test_export_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.sdk.trace.export", None)
    with pytest.raises(StartError, match=r"pip install drorae\[otel\]"):
        create_app(Settings(otlp_endpoint="http://127.0.0.1:1"))
