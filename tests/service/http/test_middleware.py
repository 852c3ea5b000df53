"""What every answer carries and every request is counted under; deadlines by header; cross-origin rules."""

import asyncio
import logging
import re
import socket
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from model.tokenizer import Tokenizer
from service.api import steps
from service.app import create_app
from service.errors import OptionError
from service.http.keys import ApiKeys
from service.http.middleware import SLICE_BYTES, GateMiddleware, RequestMiddleware, parse_timeout_s
from service.settings import Settings
from service.telemetry.context import RequestContext
from service.telemetry.logs import ACCESS_FIELDS
from service.telemetry.metrics import Metrics

Check = Callable[..., dict[str, Any]]
ORIGIN = "https://app.example"


@pytest.mark.parametrize(
    ("method", "path", "options", "status"),
    [
        ("GET", "/livez", {}, 200),
        ("GET", "/openapi.json", {}, 200),
        ("GET", "/nowhere", {}, 404),
        ("GET", "/encode", {}, 405),
        ("POST", "/encode", {"content": b""}, 400),
        ("POST", "/encode", {"params": {"dtype": "int3"}, "content": b"x"}, 422),
        ("POST", "/encode", {"headers": {"X-Request-Timeout": "soon"}, "content": b"x"}, 422),
    ],
)
def test_every_answer_has_the_headers(
    client: httpx.Client, method: str, path: str, options: dict[str, Any], status: int
) -> None:
    response = client.request(method, path, **options)
    assert response.status_code == status
    assert re.fullmatch(r"[0-9a-f]{32}", response.headers["x-request-id"])
    assert re.search(r"total;dur=[\d.]+$", response.headers["server-timing"])
    assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-00", response.headers["traceparent"])
    assert response.headers["x-content-type-options"] == "nosniff"
    assert response.headers["cache-control"] == "no-store"


def test_unexpected_failures_have_the_headers_too(
    serve: Any, tokenizer: Tokenizer, png: bytes, check_problem: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("secret detail")

    with serve(create_app(Settings(cors_origins=ORIGIN), tokenizer)) as running:
        monkeypatch.setattr("service.api.steps.split_images", fail)
        response = running.client.post("/encode", content=png, headers={"Origin": ORIGIN})
        check_problem(response, 500, "internal")
        assert response.headers["traceparent"]
        assert response.headers["access-control-allow-origin"] == ORIGIN


def test_request_ids(client: httpx.Client) -> None:
    def answered(*proposed: str) -> str:
        headers = [("X-Request-ID", value) for value in proposed]
        return str(client.get("/livez", headers=headers).headers["x-request-id"])

    assert answered("mine-1") == "mine-1"
    for unusable in (("a b",), ("x" * 129,), ("",), ("one", "two")):
        assert re.fullmatch(r"[0-9a-f]{32}", answered(*unusable))
    assert answered() != answered()


@pytest.mark.parametrize(
    ("value", "seconds"), [("1", 1.0), ("0.25", 0.25), ("007", 7.0), ("999999999999999", 999999999999999.0)]
)
def test_timeouts_that_are_read(value: str, seconds: float) -> None:
    assert parse_timeout_s([value]) == seconds


@pytest.mark.parametrize(
    "values",
    [
        *([value] for value in ("", "0", "0.000", "-1", "+1", "1e3", "nan", "inf", "1,5", "5s", " 1", "1\n")),
        *([value] for value in (".5", "5.", "0x1", "١", "1" * 16)),
        ["1", "1"],
    ],
)
def test_timeouts_that_are_not(values: list[str]) -> None:
    with pytest.raises(OptionError, match="X-Request-Timeout"):
        parse_timeout_s(values)


def test_a_request_sets_its_deadline(
    serve: Any, gated: Any, png: bytes, check_problem: Check, monkeypatch: pytest.MonkeyPatch
) -> None:
    contexts: list[RequestContext] = []
    with serve(create_app(Settings(max_request_timeout_s=90, batch_size=1), gated)) as running:

        def noting_admit(request: Any, *arguments: Any) -> Any:
            contexts.append(request.state.context)
            return steps.admit(request, *arguments)

        monkeypatch.setattr("service.api.routes.admit", noting_admit)
        late = running.client.post("/encode", content=png, headers={"X-Request-Timeout": "0.2"})
        check_problem(late, 504, "deadline-passed")
        gated.gate.set()
        for headers in ({"X-Request-Timeout": "5000"}, {"X-Request-Timeout": "30"}, {}):
            answer = running.client.post("/encode", content=png, headers=headers)
            assert answer.status_code == 200
    given = [round(context.deadline_s - context.started_s, 3) for context in contexts]
    assert given == [0.2, 90, 30, 60]


def test_a_bad_timeout_is_refused_before_the_body(server: Any) -> None:
    address = server.client.base_url.host, server.client.base_url.port
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(
            b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\nX-Request-Timeout: 0\r\n\r\n"
        )
        assert connection.recv(12) == b"HTTP/1.1 422"


def test_bytes_are_counted_by_route(serve: Any, tokenizer: Tokenizer, png: bytes) -> None:
    with serve(create_app(Settings(), tokenizer)) as running:
        answer = running.client.post("/encode", content=png)
        running.client.post("/nowhere", content=png)
        running.client.get("/info")
        text = running.client.get("/metrics").text
    assert f'drorae_request_bytes_sum{{route="/encode"}} {float(len(png))}' in text
    assert f'drorae_response_bytes_sum{{route="/encode"}} {float(len(answer.content))}' in text
    assert "drorae_request_bytes_count" in text
    assert 'drorae_request_bytes_count{route="other"}' not in text
    assert 'drorae_request_bytes_count{route="/info"}' not in text


def test_the_access_line_has_its_fields(
    client: httpx.Client, png: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    answer = client.post("/encode", content=png, headers={"X-Request-ID": "mine"})
    [line] = [entry for entry in caplog.records if getattr(entry, "request_id", "") == "mine"]
    fields = {name: getattr(line, name) for name in ACCESS_FIELDS}
    assert fields.pop("duration_ms") > 0
    assert f"00-{fields.pop('trace_id')}-{fields.pop('span_id')}-00" == answer.headers["traceparent"]
    assert fields == {
        "method": "POST",
        "route": "/encode",
        "status": 200,
        "outcome": "ok",
        "request_id": "mine",
        "bytes_in": len(png),
        "bytes_out": len(answer.content),
    }


@pytest.mark.parametrize("error", [RuntimeError("boom"), asyncio.CancelledError()])
def test_an_answer_that_breaks_off_is_counted_as_ours(error: BaseException) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        raise error

    async def ask() -> None:
        async def send(_: Any) -> None: ...

        scope = {"type": "http", "method": "GET", "path": "/x", "headers": []}
        await RequestMiddleware(app, 1.0, metrics, ("/x",))(scope, send, send)  # type: ignore[arg-type]

    metrics = Metrics()
    with pytest.raises(type(error)):
        asyncio.run(ask())
    text = metrics.render().decode()
    assert 'drorae_requests_total{outcome="internal",route="/x"} 1.0' in text
    assert "drorae_requests_in_flight 0.0" in text


def test_an_application_decides_what_may_be_stored() -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        stored = [(b"cache-control", b"max-age=9")]
        await send({"type": "http.response.start", "status": 200, "headers": stored})
        await send({"type": "http.response.body"})

    async def ask() -> httpx.Response:
        wrapped = RequestMiddleware(app, 1.0, Metrics(), ())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=wrapped)) as client:
            return await client.get("http://service/")

    assert asyncio.run(ask()).headers.get_list("cache-control") == ["max-age=9"]


@pytest.fixture(scope="module")
def cross_origin(serve: Any, tokenizer: Tokenizer) -> Iterator[httpx.Client]:
    settings = Settings(cors_origins=f"{ORIGIN},https://b.example", api_keys="0123456789abcdef")
    with serve(create_app(settings, tokenizer)) as running:
        yield running.client


def preflight(client: httpx.Client, origin: str, method: str = "POST", headers: str = "") -> httpx.Response:
    asked = {"Origin": origin, "Access-Control-Request-Method": method}
    if headers:
        asked["Access-Control-Request-Headers"] = headers
    return client.options("/encode", headers=asked)


def test_closed_by_default(client: httpx.Client) -> None:
    assert "access-control-allow-origin" not in client.get("/livez", headers={"Origin": ORIGIN}).headers
    assert preflight(client, ORIGIN).status_code == 405


def test_a_preflight_needs_no_key(cross_origin: httpx.Client) -> None:
    wanted = "authorization, content-type, x-request-id, x-request-timeout, traceparent, tracestate"
    response = preflight(cross_origin, ORIGIN, headers=wanted)
    assert response.status_code == 200
    assert response.headers["access-control-allow-origin"] == ORIGIN
    assert response.headers["x-request-id"]
    assert "access-control-allow-credentials" not in response.headers


@pytest.mark.parametrize(
    "refused",
    [
        {"origin": "https://evil.example"},
        {"origin": ORIGIN, "method": "DELETE"},
        {"origin": ORIGIN, "headers": "x-other"},
    ],
)
def test_other_preflights_are_refused(
    cross_origin: httpx.Client, refused: dict[str, str], check_problem: Check
) -> None:
    response = preflight(cross_origin, **refused)
    check_problem(response, 400, "malformed", "Disallowed CORS")
    assert "Origin" in response.headers["vary"]


def test_answers_are_sent_in_slices() -> None:
    """What a client leaves unread waits in its request, where it is counted, not in the connection."""
    body = bytes(range(256)) * 1024

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": body})

    async def ask() -> list[dict[str, Any]]:
        parts = []

        async def send(message: dict[str, Any]) -> None:
            parts.append(message)

        scope = {"type": "http", "method": "GET", "path": "/x", "headers": []}
        await RequestMiddleware(app, 1.0, Metrics(), ())(scope, send, send)  # type: ignore[arg-type]
        return parts[1:]

    parts = asyncio.run(ask())
    assert b"".join(part["body"] for part in parts) == body
    assert max(len(part["body"]) for part in parts) == SLICE_BYTES
    assert [part["more_body"] for part in parts] == [True, True, True, False]


def test_a_request_that_is_cancelled_gets_an_answer(check_problem: Check) -> None:
    async def app(scope: Any, receive: Any, send: Any) -> None:
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(30)

    async def ask() -> httpx.Response:
        gate = GateMiddleware(app, ApiKeys(Settings()), 60.0, retry_after_s=7)
        wrapped = RequestMiddleware(gate, 1.0, Metrics(), ())
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=wrapped)) as client:
            return await client.get("http://service/")

    response = asyncio.run(ask())
    check_problem(response, 503, "unavailable", "stopped")
    assert response.headers["retry-after"] == "7"


def test_refusals_can_be_read_by_the_page(cross_origin: httpx.Client, check_problem: Check) -> None:
    response = cross_origin.post("/encode", content=b"x", headers={"Origin": ORIGIN})
    check_problem(response, 401, "unauthorized")
    assert response.headers["access-control-allow-origin"] == ORIGIN
    exposed = {name.strip().lower() for name in response.headers["access-control-expose-headers"].split(",")}
    assert exposed == {
        *("shape", "dtype", "x-request-id", "server-timing", "retry-after", "traceparent", "tracestate"),
    }
    other = cross_origin.post("/encode", content=b"x", headers={"Origin": "https://evil.example"})
    assert "access-control-allow-origin" not in other.headers


def test_any_origin(serve: Any, tokenizer: Tokenizer) -> None:
    with serve(create_app(Settings(cors_origins="*"), tokenizer)) as running:
        response = running.client.get("/info", headers={"Origin": "https://anyone.example"})
    assert response.headers["access-control-allow-origin"] == "*"
