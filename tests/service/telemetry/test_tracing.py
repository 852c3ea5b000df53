"""W3C trace context: what is a valid header, and what is passed on."""

import random
import re
from typing import Any

import httpx
import pytest

from service.telemetry.tracing import MAX_TRACESTATE_CHARS, TraceContext, parse_tracestate, random_hex

TRACE, SPAN = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
VALID = f"00-{TRACE}-{SPAN}-01"


@pytest.mark.parametrize(
    ("header", "sampled"),
    [
        (VALID, True),
        (f"00-{TRACE}-{SPAN}-00", False),
        (f"00-{TRACE}-{SPAN}-02", False),
        (f"00-{TRACE}-{SPAN}-ff", True),
        (f"cc-{TRACE}-{SPAN}-01", True),
        (f"cc-{TRACE}-{SPAN}-01-what-the-future-brings", True),
        (f"01-{TRACE}-{SPAN}-01-", True),
    ],
)
def test_a_valid_parent_is_continued(header: str, sampled: bool) -> None:
    trace = TraceContext.of([header], sample_fresh=not sampled)
    assert (trace.trace_id, trace.parent_id, trace.sampled) == (TRACE, SPAN, sampled)
    assert trace.span_id != SPAN
    assert trace.traceparent == f"00-{TRACE}-{trace.span_id}-{'01' if sampled else '00'}"


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
        [f" {VALID}"],
        [f"{VALID}\n"],
        [f"{VALID},{VALID}"],
        [f"00-{TRACE}-{SPAN}-٠١"],
    ],
)
def test_an_invalid_parent_begins_a_trace(headers: list[str]) -> None:
    for sample_fresh in (False, True):
        trace = TraceContext.of(headers, ["a=1"], sample_fresh)
        assert trace.trace_id != TRACE
        assert (trace.parent_id, trace.tracestate, trace.sampled) == ("", "", sample_fresh)
        assert re.fullmatch(r"00-[0-9a-f]{32}-[0-9a-f]{16}-0[01]", trace.traceparent)


def test_ids_are_fresh_whatever_the_program_seeds() -> None:
    random.seed(0)
    first = TraceContext.fresh()
    random.seed(0)
    second = TraceContext.fresh()
    assert first.trace_id != second.trace_id
    assert first.span_id != second.span_id
    assert all(len(random_hex(16)) == 16 for _ in range(1000))


@pytest.mark.parametrize(
    ("values", "passed_on"),
    [
        (["a=1,b=2"], "a=1,b=2"),
        (["a=1", "b=2"], "a=1,b=2"),
        ([" a=1 ,\tb=2,,"], "a=1,b=2"),
        (["tenant@system=x y"], "tenant@system=x y"),
        ([""], ""),
        (["a"], ""),
        (["A=1"], ""),
        (["a=1,a=2"], ""),
        (["a=1=2"], ""),
        (["a=\u00e9"], ""),
        (["a=1\x01"], ""),
        ([",".join(f"k{index}=1" for index in range(33))], ""),
        (["a=" + "x" * 9000], ""),
    ],
)
def test_tracestate(values: list[str], passed_on: str) -> None:
    assert parse_tracestate(values) == passed_on


def test_a_long_tracestate_loses_whole_members() -> None:
    large, small = "large=" + "x" * 200, [f"k{index}={'v' * 50}" for index in range(9)]
    passed_on = parse_tracestate([",".join([small[0], large, *small[1:]])])
    assert passed_on == ",".join(small)
    crowded = [f"k{index}={'v' * 100}" for index in range(9)]
    passed_on = parse_tracestate(crowded)
    assert passed_on == ",".join(crowded[:4])
    assert len(passed_on) <= MAX_TRACESTATE_CHARS


def test_over_a_socket(client: httpx.Client) -> None:
    sent: list[tuple[str, str]] = [("traceparent", VALID), ("tracestate", "a=1"), ("tracestate", "b=2")]
    answer: Any = client.get("/livez", headers=sent).headers
    assert re.fullmatch(rf"00-{TRACE}-(?!{SPAN})[0-9a-f]{{16}}-01", answer["traceparent"])
    assert answer["tracestate"] == "a=1,b=2"
    answer = client.get("/livez", headers=[("traceparent", VALID), *sent]).headers
    assert TRACE not in answer["traceparent"]
    assert "tracestate" not in answer
