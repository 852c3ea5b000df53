"""Raw bytes on real sockets: bounds on connections and request heads, and requests that are none."""

import json
import logging
import random
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import httpx
import pytest

from model.tokenizer import Tokenizer
from service.app import create_app
from service.http.protocol import MAX_HEAD_BYTES, MAX_HEADERS
from service.settings import Settings
from tests.service.conftest import read_all

GET = b"GET /livez HTTP/1.1\r\nHost: x\r\n\r\n"
Address = tuple[str, int]


def address_of(running: Any) -> Address:
    return running.client.base_url.host, running.client.base_url.port


def connect(address: Address) -> socket.socket:
    return socket.create_connection(address, timeout=30)


def read_answer(connection: socket.socket) -> bytes:
    """One answer with a Content-Length."""
    received = b""
    while b"\r\n\r\n" not in received:
        chunk = connection.recv(65536)
        assert chunk, received
        received += chunk
    head, _, body = received.partition(b"\r\n\r\n")
    [length] = [int(line[15:]) for line in head.lower().splitlines() if line.startswith(b"content-length:")]
    while len(body) < length:
        body += connection.recv(65536)
    return head + b"\r\n\r\n" + body


def rejected(running: Any, reason: str) -> float:
    counter = running.app.state.parts.metrics.rejected_connections
    return float(counter.labels(reason)._value.get())


def problem_of(answer: bytes) -> tuple[int, dict[str, Any]]:
    head, _, body = answer.partition(b"\r\n\r\n")
    assert b"content-type: application/problem+json" in head
    assert b"connection: close" in head
    return int(head.split(b" ")[1]), json.loads(body)


@pytest.fixture(scope="module")
def running(serve: Any, tokenizer: Tokenizer) -> Iterator[Any]:
    """A server with short patience for heads."""
    with serve(create_app(Settings(header_timeout_s=0.3, keep_alive_timeout_s=3), tokenizer)) as started:
        yield started


@pytest.fixture(scope="module")
def address(running: Any) -> Address:
    return address_of(running)


def read_whole_answer(connection: socket.socket, request: bytes = GET) -> bytes:
    connection.sendall(request)
    return read_answer(connection)


def test_at_the_limit_the_longest_idle_connection_is_closed(serve: Any, tokenizer: Tokenizer) -> None:
    with serve(create_app(Settings(max_connections=3), tokenizer)) as limited:
        address = address_of(limited)  # the client's own connection is one of the three, and idle first
        first, second = connect(address), connect(address)
        for connection in (first, second, first):
            assert read_whole_answer(connection).startswith(b"HTTP/1.1 200")
        with connect(address) as third, connect(address) as fourth:
            for connection in (third, fourth, first):
                assert read_whole_answer(connection).startswith(b"HTTP/1.1 200")
            assert read_all(second) == b"", "the longest idle but for the client's own"
        assert rejected(limited, "idle") == 2
        first.close()
        second.close()


def test_probes_get_in_where_no_connection_is_idle(
    serve: Any, tokenizer: Tokenizer, check_problem: Any
) -> None:
    with serve(create_app(Settings(max_connections=1), tokenizer)) as limited:
        limited.client.close()
        address = address_of(limited)
        post = b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\n"
        with connect(address) as busy:
            busy.sendall(post)
            assert busy.recv(100).startswith(b"HTTP/1.1 100")
            for path in ("/livez", "/readyz?x=1"):
                with connect(address) as probe:
                    answer = read_whole_answer(probe, GET.replace(b"/livez", path.encode()))
                    assert answer.startswith(b"HTTP/1.1 200")
            with connect(address) as other:
                other.sendall(GET.replace(b"/livez", b"/info"))
                answer = read_all(other)
            status, problem = problem_of(answer)
            assert status == 503
            assert "1 connections" in problem["detail"]
            assert b"retry-after: 1\r\n" in answer
        assert rejected(limited, "limit") == 1


def is_answered(address: Address) -> bool:
    with connect(address) as connection:
        try:
            connection.sendall(GET)
            return connection.recv(12) == b"HTTP/1.1 200"
        except OSError:
            return False


@pytest.mark.parametrize(
    "head",
    [
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (2 * MAX_HEAD_BYTES) + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"a" * (2 * MAX_HEAD_BYTES),
        b"GET /" + b"a" * (MAX_HEAD_BYTES + 10) + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * (MAX_HEADERS + 1) + b"\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n" + (b"X: " + b"y" * 1000 + b"\r\n") * 66 + b"\r\n",
        b"\r\n" * MAX_HEAD_BYTES,
    ],
    ids=["one header", "endless header", "target", "many headers", "sum of headers", "empty lines"],
)
def test_large_heads(running: Any, address: Address, head: bytes) -> None:
    before = rejected(running, "header-bytes")
    with connect(address) as connection:
        connection.sendall(head)
        status, problem = problem_of(read_all(connection))
    assert status == problem["status"] == 431
    assert problem["type"] == "urn:drorae:problem:headers-too-large"
    assert rejected(running, "header-bytes") == before + 1


def test_heads_within_the_bounds(address: Address) -> None:
    size = MAX_HEAD_BYTES - 200
    for head in (
        b"GET /livez?" + b"a" * size + b" HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX: " + b"a" * size + b"\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\n" + b"X: y\r\n" * (MAX_HEADERS - 1) + b"\r\n",
    ):
        with connect(address) as connection:
            connection.sendall(head)
            assert read_answer(connection).startswith(b"HTTP/1.1 200")


@contextmanager
def slow_client(address: Address, *parts: bytes) -> Iterator[socket.socket]:
    with connect(address) as connection:
        for part in parts:
            connection.sendall(part)
            if part.endswith(GET):
                assert read_answer(connection).startswith(b"HTTP/1.1 200")
        yield connection


@pytest.mark.parametrize(
    "parts",
    [(b"GET /li",), (b"GET /livez HTTP/1.1\r\nHost: x\r\n",), (GET, b"GET /livez HTTP/1.1\r\nHost: x\r\n")],
    ids=["request line", "headers", "a further request"],
)
def test_slow_heads_get_408(running: Any, address: Address, parts: tuple[bytes, ...]) -> None:
    before = rejected(running, "header-timeout")
    with slow_client(address, *parts) as connection:
        status, problem = problem_of(read_all(connection))
    assert status == 408
    assert problem["type"] == "urn:drorae:problem:request-timeout"
    assert rejected(running, "header-timeout") == before + 1


def test_a_client_that_says_nothing_is_told_nothing(running: Any, address: Address) -> None:
    before = rejected(running, "header-timeout")
    with connect(address) as connection:
        assert read_all(connection) == b""
    assert rejected(running, "header-timeout") == before + 1


def test_bytes_one_by_one_do_not_help(running: Any, address: Address) -> None:
    """The time counts from the first byte, whatever follows it."""
    before = rejected(running, "header-timeout")
    with slow_client(address, GET) as connection:
        connection.settimeout(0.02)
        deadline_s = time.monotonic() + 10
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: x\r\nX: ")
        answer = b""
        while time.monotonic() < deadline_s and not answer:
            connection.sendall(b"a")
            with suppress(TimeoutError):
                answer = connection.recv(12)
    assert answer == b"HTTP/1.1 408"
    assert rejected(running, "header-timeout") == before + 1


def test_idle_connections_outlive_the_head_timeout(running: Any, address: Address) -> None:
    before = rejected(running, "header-timeout")
    with slow_client(address, GET) as connection:
        connection.settimeout(0.8)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(30)
        connection.sendall(GET)
        assert read_answer(connection).startswith(b"HTTP/1.1 200")
        began_s = time.monotonic()
        assert read_all(connection) == b""
        assert 2 < time.monotonic() - began_s < 10, "closed as idle"
    assert rejected(running, "header-timeout") == before


def test_a_body_may_take_longer_than_a_head(running: Any, address: Address, png: bytes) -> None:
    with connect(address) as connection:
        connection.sendall(b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(png))
        connection.settimeout(0.6)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(30)
        connection.sendall(png)
        assert read_answer(connection).startswith(b"HTTP/1.1 200")


def test_the_rest_of_a_refused_body_is_not_awaited_for_long(address: Address) -> None:
    with connect(address) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\n")
        assert read_answer(connection).startswith(b"HTTP/1.1 404")
        connection.sendall(b"some")
        assert read_all(connection) == b""


def test_a_connection_goes_on_after_a_refused_body(address: Address) -> None:
    with connect(address) as connection:
        connection.sendall(b"POST /nowhere HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\n\r\n")
        assert read_answer(connection).startswith(b"HTTP/1.1 404")
        connection.sendall(b"some")
        connection.settimeout(0.8)
        with pytest.raises(TimeoutError):
            connection.recv(1)
        connection.settimeout(30)
        connection.sendall(GET)
        assert read_answer(connection).startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"nonsense\r\n\r\n",
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
        b"GET /\xff\xfe HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET http://[ HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET //:99999999/ HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET * HTTP/1.1\r\nHost: x\r\n\r\n",
        b"CONNECT x:1 HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nno colon\r\n\r\n",
        b"GET /livez HTTP/1.1\r\nHost: x\r\nX: a\x00b\r\n\r\n",
        b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: x\r\n\r\n",
        b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
        b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /encode HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
    ],
)
def test_what_is_no_request_gets_400(
    address: Address, request_bytes: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    with connect(address) as connection:
        connection.sendall(request_bytes)
        answer = read_all(connection)
    # Some targets are a path in the parser's eyes; they then lead nowhere.
    assert answer.split(b" ")[1] in (b"400", b"404"), answer
    if answer.split(b" ")[1] == b"400":
        assert problem_of(answer)[1]["type"] == "urn:drorae:problem:malformed"
    assert not [entry for entry in caplog.records if entry.levelno >= logging.WARNING]


def test_bytes_that_follow_do_not_cost_an_accepted_request_its_answer(address: Address, png: bytes) -> None:
    with connect(address) as connection:
        head = b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(png)
        connection.sendall(head + png + b"nonsense\r\n\r\n")
        answer = read_all(connection)
    assert [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]] == [b"200", b"400"]


def test_pipelined_requests_are_answered_in_order(address: Address) -> None:
    with connect(address) as connection:
        connection.sendall(GET + GET.replace(b"livez", b"nowhere") + GET + b"\x00")
        answer = read_all(connection)
    statuses = [part[:3] for part in answer.split(b"HTTP/1.1 ")[1:]]
    assert statuses == [b"200", b"404", b"200", b"400"]


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket"])
def test_upgrades_are_answered_as_http(address: Address, png: bytes, protocol: bytes) -> None:
    """As an HTTP/1.1 server that knows no other protocol: the body counts, the connection goes on."""
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %s\r\nHTTP2-Settings: A\r\n" % protocol
    post = b"POST /encode HTTP/1.1\r\nHost: x\r\n" + upgrade + b"Content-Length: %d\r\n\r\n" % len(png) + png
    chunked = b"POST /encode HTTP/1.1\r\nHost: x\r\n" + upgrade + b"Transfer-Encoding: chunked\r\n\r\n"
    chunked += b"%x\r\n%s\r\n0\r\n\r\n" % (len(png), png)
    with connect(address) as connection:
        for parts in ((post,), (post[:9], post[9:200], post[200:]), (chunked,), (GET,), (post,)):
            for part in parts:
                connection.sendall(part)
            assert read_answer(connection).startswith(b"HTTP/1.1 200")
    with connect(address) as connection:
        connection.sendall((b"GET /livez HTTP/1.1\r\nHost: x\r\n" + upgrade + b"\r\n") * 5 + b"\x00")
        assert read_all(connection).count(b"HTTP/1.1 200") == 5


def test_trailers_are_bounded_and_no_headers(running: Any, address: Address) -> None:
    head = b"POST /encode HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n0\r\n"
    with connect(address) as connection:
        connection.sendall(head + b"X-Request-ID: mine\r\n\r\n")
        assert read_answer(connection).startswith(b"HTTP/1.1 4")
    with connect(address) as connection:
        connection.sendall(head)
        for _ in range(MAX_HEADERS + 1):
            connection.sendall(b"X: y\r\n")
        assert b" 431 " in read_all(connection)


def test_a_client_that_ends_after_its_requests_is_answered(serve: Any, gated: Any, png: bytes) -> None:
    """It shuts down its side alone; until its answer begins it is asked whether it is there."""
    post = b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(png) + png
    with serve(create_app(Settings(), gated)) as running, connect(address_of(running)) as connection:
        connection.sendall(post + post + GET)
        assert gated.entered.acquire(timeout=30)
        connection.shutdown(socket.SHUT_WR)
        gated.gate.set()
        received = read_all(connection)
    finals = [part[:3] for part in received.split(b"HTTP/1.1 ")[1:] if not part.startswith(b"100")]
    assert finals == [b"200", b"200", b"200"]


def test_a_client_that_ended_and_went_away_is_noticed(serve: Any, gated: Any, png: bytes) -> None:
    post = b"POST /encode HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % len(png) + png
    with serve(create_app(Settings(), gated)) as running:
        with connect(address_of(running)) as connection:
            connection.sendall(post)
            assert gated.entered.acquire(timeout=30)
            connection.shutdown(socket.SHUT_WR)
            assert connection.recv(25) == b"HTTP/1.1 100 Continue\r\n\r\n"
        deadline_s = time.monotonic() + 30
        while running.app.state.parts.admission.num_requests:
            assert time.monotonic() < deadline_s
        gated.gate.set()


def test_old_clients_are_never_told_to_continue(address: Address) -> None:
    with connect(address) as connection:
        connection.sendall(b"POST /encode HTTP/1.0\r\nContent-Length: 2\r\nExpect: 100-continue\r\n\r\nab")
        assert read_all(connection).startswith(b"HTTP/1.1 415")


def test_mutated_requests(running: Any, address: Address, caplog: pytest.LogCaptureFixture) -> None:
    """Seeded: whatever the bytes, there is an answer that is no fault of ours, or the end."""
    generator = random.Random(20)
    seeds = (
        GET,
        b"POST /encode?format=raw&dtype=float16 HTTP/1.1\r\nHost: x\r\nContent-Length: 3\r\n\r\nabc",
        b"POST /decode HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nExpect: 100-continue\r\n\r\n"
        b"3\r\nabc\r\n0\r\n\r\n",
        b"GET http://h:80/a%20b?c#d HTTP/1.0\r\nConnection: keep-alive\r\nUpgrade: h2c\r\n\r\n",
    )
    for _ in range(400):
        data = bytearray(generator.choice(seeds))
        for _ in range(generator.randrange(1, 6)):
            at = generator.randrange(len(data))
            match generator.randrange(4):
                case 0:
                    data[at] = generator.randrange(256)
                case 1:
                    del data[at : at + generator.randrange(1, 8)]
                case 2:
                    data[at:at] = generator.randbytes(generator.randrange(1, 8))
                case _:
                    data[at:at] = data[: generator.randrange(len(data))]
            data = data or bytearray(b" ")
        with connect(address) as connection:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)
            answer = read_all(connection)
        for part in answer.split(b"HTTP/1.1 ")[1:]:
            assert part[:1] in b"1234" or part[:3] in (b"501", b"505"), (bytes(data), answer)
    assert not [entry for entry in caplog.records if entry.exc_info or entry.levelno >= logging.ERROR]
    assert httpx.get(f"http://{address[0]}:{address[1]}/livez").status_code == 200
    in_flight = running.app.state.parts.metrics.requests_in_flight
    assert any(is_answered(address) and in_flight._value.get() == 0 for _ in range(1000))


def test_an_answer_that_nobody_reads_is_dropped(serve: Any, tokenizer: Tokenizer) -> None:
    """Pipelined answers of 3 MiB each, more than the sockets hold."""
    settings = Settings(answer_timeout_s=2)
    latents = bytes(64 * 32 * 8 * 8 * 2)
    query = "dtype=float16&shape=64&shape=32&shape=8&shape=8&format=raw&output_dtype=float32"
    head = f"POST /decode?{query} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(latents)}\r\n\r\n"
    with serve(create_app(settings, tokenizer)) as running, connect(address_of(running)) as greedy:
        greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        greedy.sendall((head.encode() + latents) * 5)
        deadline_s = time.monotonic() + 30
        while rejected(running, "slow-reader") < 1:
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        assert running.client.get("/readyz").status_code == 200
