"""Where requests end, and the heads that are refused: pieces alone, then on real sockets."""

import json
import re
import socket
from collections.abc import Iterator
from typing import Any

import httptools
import pytest

from model.tokenizer import Tokenizer
from service.app import create_app
from service.errors import HeadersTooLargeError, MalformedError, TransferCodingError
from service.http.framing import MAX_VALUE_BYTES, Framer, body_bytes, is_read
from service.settings import Settings
from tests.service.conftest import read_all

GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
POST = b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%s"
CHUNKED = b"POST /encode HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


class Parsing:
    """A parser that is fed by a framer; notes how many messages were complete after every piece."""

    def __init__(self) -> None:
        self.framer = Framer()
        self.parser = httptools.HttpRequestParser(self)
        self.headers: list[tuple[bytes, bytes]] = []
        self.num_complete = 0
        self.bodies = [bytearray()]

    def on_message_begin(self) -> None:
        self.headers = []

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers.append((name.lower(), value))

    def on_headers_complete(self) -> None:
        self.framer.begin_body(body_bytes("1.1", self.headers))

    def on_body(self, body: bytes) -> None:
        self.bodies[-1] += body

    def on_message_complete(self) -> None:
        self.num_complete += 1
        self.bodies.append(bytearray())
        self.framer.begin_head()

    def feed(self, data: bytes) -> None:
        at = 0
        while at < len(data):
            end = self.framer.cut(data, at)
            assert at < end <= len(data)
            before = self.num_complete
            self.parser.feed_data(data[at:end])
            assert self.num_complete <= before + 1, "one message at most ends in a piece"
            at = end


STREAM = (
    b"\r\n\r\n"
    + GET
    + POST % (4, b"\r\n\r\n")
    + GET
    + CHUNKED
    + b'4;name="v"\r\n\r\n\r\n\r\n0b\r\n0\r\n\r\nGET /x\r\n00\r\nA: 5\r\nB: ff\r\n\r\n'
    + GET
    + CHUNKED
    + b"0\r\n\r\n"
    + POST % (0, b"")
    + POST % (3, b"abc")
)


@pytest.mark.parametrize("size", [*range(1, 12), len(STREAM)])
def test_pieces_end_with_messages(size: int) -> None:
    """However the bytes arrive."""
    parsing = Parsing()
    for start in range(0, len(STREAM), size):
        parsing.feed(STREAM[start : start + size])
    assert parsing.num_complete == 8
    whole = [bytes(body) for body in parsing.bodies]
    assert whole[:8] == [b"", b"\r\n\r\n", b"", b"\r\n\r\n0\r\n\r\nGET /x", b"", b"", b"", b"abc"]


@pytest.mark.parametrize(
    ("version", "headers", "expected"),
    [
        ("1.1", [], 0),
        ("1.1", [(b"content-length", b"007")], 7),
        ("1.0", [(b"content-length", b"7")], 7),
        ("1.1", [(b"transfer-encoding", b"Chunked")], None),
        ("1.0", [(b"transfer-encoding", b"chunked")], MalformedError),
        ("1.1", [(b"transfer-encoding", b"chunked"), (b"content-length", b"7")], MalformedError),
        ("1.1", [(b"transfer-encoding", b"chunked, chunked")], MalformedError),
        ("1.1", [(b"transfer-encoding", b"chunked")] * 2, MalformedError),
        ("1.1", [(b"transfer-encoding", b"chunked, gzip")], MalformedError),
        ("1.1", [(b"transfer-encoding", b"identity")], MalformedError),
        ("1.1", [(b"transfer-encoding", b"xchunked")], MalformedError),
        ("1.1", [(b"transfer-encoding", b"gzip, chunked")], TransferCodingError),
        ("1.1", [(b"transfer-encoding", b"gzip"), (b"transfer-encoding", b"chunked")], TransferCodingError),
        ("1.1", [(b"content-length", b"+7")], MalformedError),
        ("1.1", [(b"content-length", b"7"), (b"content-length", b"8")], MalformedError),
    ],
)
def test_lengths_of_bodies(version: str, headers: list[tuple[bytes, bytes]], expected: Any) -> None:
    if expected is None or isinstance(expected, int):
        assert body_bytes(version, headers) == expected
    else:
        with pytest.raises(expected):
            body_bytes(version, headers)


def test_values_that_are_taken_apart_are_short() -> None:
    assert is_read(b"accept", b"a" * MAX_VALUE_BYTES)
    assert is_read(b"cookie", b"a" * 60_000), "nobody looks at it"
    with pytest.raises(HeadersTooLargeError, match="'accept' is longer"):
        is_read(b"accept", b"a" * (MAX_VALUE_BYTES + 1))
    assert not is_read(b"tracestate", b"a" * (MAX_VALUE_BYTES + 1))


@pytest.fixture(scope="module")
def address(serve: Any, tokenizer: Tokenizer) -> Iterator[tuple[str, int]]:
    with serve(create_app(Settings(header_timeout_s=0.5), tokenizer)) as running:
        yield running.client.base_url.host, running.client.base_url.port


def exchange(address: tuple[str, int], data: bytes) -> tuple[list[int], bytes]:
    """Statuses of all answers until the server closes, and every byte of them."""
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(data)
        received = read_all(connection)
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d{3}) ", received)], received


END = b"nonsense\r\n\r\n"  # after which the server closes


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (b"GET /livez HTTP/1.1\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nHost: a\r\nHost: a\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nHost: a b\r\n\r\n", 400),
        (b"GET /livez HTTP/1.1\r\nHost: a/b\r\n\r\n", 400),
        (b"GET /livez HTTP/1.0\r\nHost: a\r\nHost: b\r\n\r\n", 400),
        (b"GET /livez\r\n\r\n", 505),
        (b"GET /livez HTTP/0.9\r\n\r\n", 505),
        (b"GET /livez HTTP/1.2\r\nHost: x\r\n\r\n", 505),
        (b"GET /livez HTTP/2.0\r\nHost: x\r\n\r\n", 505),
        (b"GET /livez HTTP/9.9\r\nHost: x\r\n\r\n", 505),
        (b"GET /livez RTSP/1.0\r\nHost: x\r\n\r\n", 505),
        (b"OPTIONS * RTSP/1.0\r\n\r\n", 505),
        (b"SOURCE /livez ICE/1.0\r\n\r\n", 505),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
        (CHUNKED.replace(b"chunked", b"gzip, chunked"), 501),
        (CHUNKED.replace(b"chunked", b"chunked, gzip"), 400),
        (CHUNKED.replace(b"chunked", b"xchunked"), 400),
        (CHUNKED.replace(b"chunked", b"chunked, chunked"), 400),
        (CHUNKED.replace(b"1.1", b"1.0"), 400),
        (CHUNKED.replace(b"Host", b"Content-Length: 4\r\nHost"), 400),
        (GET.replace(b"Host", b"Accept: " + b"a/b;q=1," * 5000 + b"\r\nHost"), 431),
        (GET.replace(b"Host", b"Content-Type: a/b" + b";" * 60_000 + b"\r\nHost"), 431),
        (GET.replace(b"Host", b"Authorization: Bearer " + b"k" * 3000 + b"\r\nHost"), 431),
        (GET.replace(b"Host", b"X-Request-Timeout: " + b"1" * 3000 + b"\r\nHost"), 431),
        (GET.replace(b"Host: x", b"Host: " + b"x" * 3000), 431),
    ],
)
def test_heads_that_are_refused(address: tuple[str, int], head: bytes, status: int) -> None:
    """Each with a problem document, and nothing that follows is taken for a request."""
    statuses, received = exchange(address, head + b"0\r\n\r\n" + GET)
    assert statuses == [status]
    head, _, body = received.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head
    assert b"connection: close" in head
    problem = json.loads(body)
    assert problem["status"] == status
    assert f"x-request-id: {problem['request_id']}".encode() in head


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez HTTP/1.0\r\n\r\n",
        GET.replace(b"Host: x", b"Host: [::1]:80\r\nConnection: close"),
        GET.replace(b"Host: x", b"Host:\r\nConnection: close"),
        GET.replace(
            b"Host: x", b"Host:\tx \t\r\nConnection: close \r\nX-Request-Timeout: 9 \r\nContent-Length: 0 "
        ),
        GET.replace(b"Host: x", b"Host: x\r\nConnection: close\r\nCookie: " + b"c" * 30_000),
        GET.replace(b"Host: x", b"Host: x\r\nConnection: close\r\ntracestate: " + b"a=b," * 1000),
    ],
)
def test_heads_that_are_not(address: tuple[str, int], head: bytes) -> None:
    assert exchange(address, head)[0] == [200]


def test_pipelined_requests_are_answered_one_after_the_other(address: tuple[str, int], png: bytes) -> None:
    chunked = CHUNKED + b"%x\r\n%s\r\n0\r\nA: b\r\n\r\n" % (len(png), png)
    requests = [POST % (len(png), png), GET, chunked, GET, POST % (3, b"abc"), chunked, GET]
    statuses, _ = exchange(address, b"".join(requests) + END)
    assert statuses == [200, 200, 200, 200, 415, 200, 200, 400]


def test_pipelined_requests_wait_as_bytes(serve: Any, gated: Any, png: bytes) -> None:
    """While the first one is with the model, no other has begun, and the client's next bytes are not read."""
    with serve(create_app(Settings(cpu_workers=1, batch_size=1), gated)) as running:
        address = running.client.base_url.host, running.client.base_url.port
        in_flight = running.app.state.parts.metrics.requests_in_flight
        with socket.create_connection(address, timeout=30) as connection:
            connection.sendall(POST % (len(png), png) + GET * 500)
            assert gated.entered.acquire(timeout=30)
            assert in_flight._value.get() == 1
            connection.settimeout(0.5)
            with pytest.raises(TimeoutError):
                connection.sendall(GET * 1_000_000)
            gated.gate.set()
            connection.settimeout(30)
            received = b""
            while received.count(b"HTTP/1.1 200") < 501:
                received += connection.recv(65536)


def test_tiny_chunks_leave_the_loop_to_others(address: tuple[str, int], png: bytes) -> None:
    body = b"".join(b"1\r\n%c\r\n" % byte for byte in png)
    with socket.create_connection(address, timeout=30) as connection:
        connection.sendall(CHUNKED + body + b"0\r\n\r\n" + GET)
        received = b""
        while received.count(b"HTTP/1.1 200") < 2:
            received += connection.recv(65536)
