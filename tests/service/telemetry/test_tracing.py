"""W3C trace context: which parents are continued, what is passed on, and what is left without the extra."""

import logging
import random
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import pytest

from model.tokenizer import Tokenizer
from service.app import create_app
from service.settings import Settings
from service.telemetry.context import RequestContext
from service.telemetry.tracing import Tracing, find_tracing, trace_ids

pytest.importorskip("opentelemetry.trace")
TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALID = f"00-{TRACE}-{SPAN}-01"


@pytest.fixture(scope="module", params=["", "http://127.0.0.1:9"], ids=["alone", "exporting"])
def tracing(request: pytest.FixtureRequest) -> Iterator[Tracing]:
    """No span ends here, so none is sent."""
    tracing = Tracing(request.param, "1")
    yield tracing
    tracing.close()


def begin(tracing: Tracing, traceparents: list[str], tracestates: list[str] | None = None) -> RequestContext:
    context = RequestContext("x", 0.0)
    tracing.begin(context, {"traceparent": traceparents, "tracestate": tracestates or []})
    return context


@pytest.mark.parametrize(
    ("header", "flags"),
    [
        (VALID, "01"),
        (f"00-{TRACE}-{SPAN}-00", "00"),
        (f"00-{TRACE}-{SPAN}-02", "02"),
        (f"00-{TRACE}-{SPAN}-ff", "03"),
        (f"cc-{TRACE}-{SPAN}-01", "01"),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-brings", "01"),
        (f"01-{TRACE}-{SPAN}-01-", "01"),
    ],
)
def test_a_valid_parent_is_continued(tracing: Tracing, header: str, flags: str) -> None:
    """Its flags are passed on: 01 is sampled, 02 says that its id is random."""
    context = begin(tracing, [header])
    assert context.span is not None
    ids = trace_ids(context.span)
    assert ids["trace_id"] == TRACE
    assert ids["span_id"] != SPAN
    assert context.trace_headers == {"traceparent": f"00-{TRACE}-{ids['span_id']}-{flags}"}


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [""],
        [VALID, VALID],
        [VALID.upper()],
        [f"ff-{TRACE}-{SPAN}-01"],
        [f"00-{'0' * 32}-{SPAN}-01"],
        [f"00-{TRACE}-{'0' * 16}-01"],
        [f"{VALID}-more"],
        [f"{VALID}-"],
        [f"cc-{TRACE}-{SPAN}-01.more"],
        [f"0-{TRACE}-{SPAN}-01"],
        [f"00-{TRACE[:-1]}-{SPAN}-01"],
        [f"00-{TRACE}-{SPAN}0-01"],
        [f"00-{TRACE}-{SPAN}-1"],
        [f"00-{TRACE}-{SPAN}-0x"],
        [f"00-{TRACE[:-1]}g-{SPAN}-01"],
        [f"{VALID},{VALID}"],
        [f"00-{TRACE}-{SPAN}-\u0660\u0661"],
        [f"cc-{TRACE}-{SPAN}-01-{'x' * 2000}"],
    ],
)
def test_an_invalid_parent_begins_a_trace(
    tracing: Tracing, headers: list[str], request: pytest.FixtureRequest
) -> None:
    context = begin(tracing, headers, ["a=1"])
    flags = "01" if "exporting" in request.node.callspec.id else "00"
    assert set(context.trace_headers) == {"traceparent"}
    assert re.fullmatch(
        rf"00-(?!{TRACE})[0-9a-f]{{32}}-[0-9a-f]{{16}}-{flags}", context.trace_headers["traceparent"]
    )


def test_ids_are_fresh_whatever_the_program_seeds(tracing: Tracing) -> None:
    random.seed(0)
    first = begin(tracing, []).trace_headers["traceparent"].split("-")
    random.seed(0)
    second = begin(tracing, []).trace_headers["traceparent"].split("-")
    assert first[1] != second[1]
    assert first[2] != second[2]


@pytest.mark.parametrize(
    ("values", "passed_on"),
    [
        (["a=1,b=2"], "a=1,b=2"),
        (["a=1", "b=2"], "a=1,b=2"),
        ([" a=1 ,\tb=2,,"], "a=1,b=2"),
        (["tenant@system=x y"], "tenant@system=x y"),
        ([""], None),
        (["a"], None),
        (["A=1"], None),
        (["a=\u00e9"], None),
        (["a=1\x01"], None),
        (["a=" + "x" * 9000], None),
    ],
)
def test_tracestate(tracing: Tracing, values: list[str], passed_on: str | None) -> None:
    assert begin(tracing, [VALID], values).trace_headers.get("tracestate") == passed_on


def test_over_a_socket(client: httpx.Client) -> None:
    sent: list[tuple[str, str]] = [("traceparent", VALID), ("tracestate", "a=1"), ("tracestate", "b=2")]
    answer: Any = client.get("/livez", headers=sent).headers
    assert re.fullmatch(rf"00-{TRACE}-(?!{SPAN})[0-9a-f]{{16}}-01", answer["traceparent"])
    assert answer["tracestate"] == "a=1,b=2"
    answer = client.get("/livez", headers=[("traceparent", VALID), *sent]).headers
    assert TRACE not in answer["traceparent"]
    assert "tracestate" not in answer


def test_without_the_extra(
    serve: Callable[..., Any],
    tokenizer: Tokenizer,
    png: bytes,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace.propagation.tracecontext", None)
    assert find_tracing("", "1") is None
    caplog.set_level(logging.INFO)
    with serve(create_app(Settings(), tokenizer)) as running:
        answer = running.client.post(
            "/encode", content=png, headers={"traceparent": VALID, "X-Request-ID": "mine"}
        )
    assert answer.status_code == 200
    assert answer.headers["x-request-id"] == "mine"
    assert "traceparent" not in answer.headers
    [line] = [entry for entry in caplog.records if getattr(entry, "request_id", "") == "mine"]
    assert not hasattr(line, "trace_id")
