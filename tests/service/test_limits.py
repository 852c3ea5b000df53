"""What clients can take by being slow: bodies that pause or trickle, answers that nobody reads."""

import asyncio
import socket
import time
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import pytest
from starlette.requests import Request

from model.tokenizer import Tokenizer
from service.app import create_app
from service.engine.devices import resident_bytes
from service.errors import DisconnectError, MalformedError, RequestTimeoutError, TooLargeError
from service.http.bodies import BodyLimits, read_body
from service.settings import Settings

MIB = 2**20
HEAD = "POST /encode HTTP/1.1\r\nHost: x\r\nContent-Type: image/png\r\n"


def read(
    *chunks: bytes | float | None, hold: Callable[[int], None] = lambda _: None, **limits: float
) -> bytes:
    """Read a body that comes as these chunks, with these pauses in seconds; None is the client's end."""
    steps = iter(chunks)

    async def receive() -> dict[str, Any]:
        for step in steps:
            if isinstance(step, float):
                await asyncio.sleep(step)
            elif step is None:
                return {"type": "http.disconnect"}
            else:
                return {"type": "http.request", "body": step, "more_body": True}
        return {"type": "http.request", "body": b"", "more_body": False}

    request = Request({"type": "http", "method": "POST", "headers": []}, receive)
    defaults = {"max_bytes": 10 * MIB, "timeout_s": 30.0, "bytes_per_s": 1}
    return asyncio.run(read_body(request, BodyLimits(**{**defaults, **limits}), hold))  # type: ignore[arg-type]


@pytest.mark.parametrize("size", [10, 100_000, 3 * MIB])
def test_bodies_come_whole(size: int) -> None:
    held: list[int] = []
    chunks = [bytes([index]) * size for index in range(3)]
    assert read(*chunks, hold=held.append) == b"".join(chunks)
    assert held == [size, 2 * size, 3 * size, 3 * size], "what came, before it is kept"


def test_bodies_that_do_not() -> None:
    with pytest.raises(MalformedError, match="empty"):
        read()
    with pytest.raises(TooLargeError):
        read(b"x" * 11, max_bytes=10)
    with pytest.raises(DisconnectError):
        read(b"x", None)


@pytest.mark.parametrize("paused", [[], [b"x" * 100_000]])
def test_a_body_may_not_pause(paused: list[bytes]) -> None:
    with pytest.raises(RequestTimeoutError, match=r"0\.05 s"):
        read(*paused, 60.0, timeout_s=0.05)


def test_a_body_may_not_trickle_however_fast_it_was() -> None:
    steps = [b"x" * MIB, *(step for _ in range(1000) for step in (0.01, b"x"))]
    with pytest.raises(RequestTimeoutError, match="too slowly"):
        read(*steps, timeout_s=0.2, bytes_per_s=1000)


def test_a_body_may_take_its_time_at_the_least_rate() -> None:
    steps = [step for _ in range(20) for step in (0.02, b"x" * 50_000)]
    assert len(read(*steps, timeout_s=0.2, bytes_per_s=100_000)) == 20 * 50_000


def connect(running: Any) -> socket.socket:
    url = running.client.base_url
    return socket.create_connection((url.host, url.port), timeout=30)


def pending_bytes(running: Any) -> float:
    return running.app.state.parts.metrics.registry.get_sample_value("drorae_pending_bytes")


def eventually(condition: Callable[[], bool]) -> None:
    deadline_s = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_slow_bodies_are_told_so_and_closed(serve: Any, tokenizer: Tokenizer) -> None:
    with serve(create_app(Settings(body_timeout_s=0.3), tokenizer)) as running, ExitStack() as stack:
        clients = [stack.enter_context(connect(running)) for _ in range(3)]
        framing = ("Transfer-Encoding: chunked", "Content-Length: 67108864", "Content-Length: 2")
        for client, header in zip(clients, framing, strict=True):
            client.sendall(f"{HEAD}{header}\r\n\r\n".encode())
        for client in clients:
            answer = b""
            while chunk := client.recv(65536):
                answer += chunk
            head, _, body = answer.partition(b"\r\n\r\n")
            assert head.startswith(b"HTTP/1.1 408")
            assert b"content-type: application/problem+json" in head
            assert b"connection: close" in head
            assert b"urn:drorae:problem:request-timeout" in body


@pytest.mark.parametrize("declared", ["Transfer-Encoding: chunked", "Content-Length: 67108864"])
def test_bodies_that_have_not_come_take_no_room(
    serve: Any, tokenizer: Tokenizer, png: bytes, declared: str
) -> None:
    with serve(create_app(Settings(), tokenizer)) as running, ExitStack() as stack:
        for _ in range(9):
            stack.enter_context(connect(running)).sendall(f"{HEAD}{declared}\r\n\r\n".encode())
        in_flight = running.app.state.parts.admission
        eventually(lambda: in_flight.num_requests == 9)
        assert pending_bytes(running) == 0
        assert running.client.post("/encode", content=png).status_code == 200


def test_unfinished_bodies_take_no_items(serve: Any, tokenizer: Tokenizer, png: bytes) -> None:
    settings = Settings(queue_limit_items=4, max_items_per_request=4)
    with serve(create_app(settings, tokenizer)) as running, ExitStack() as stack:
        for _ in range(20):
            stack.enter_context(connect(running)).sendall(f"{HEAD}Content-Length: 2\r\n\r\n!".encode())
        eventually(lambda: pending_bytes(running) == 20)
        assert running.client.post("/encode", content=png).status_code == 200


def test_memory_stays_within_the_limit(serve: Any, tokenizer: Tokenizer, png: bytes) -> None:
    """Far more comes than fits; each body that finds no room is refused and forgotten."""
    limit = 64 * MIB
    settings = Settings(queue_limit_bytes=limit, max_body_bytes=16 * MIB)
    block = bytes(MIB)
    with serve(create_app(settings, tokenizer)) as running, ExitStack() as stack:
        before, most = resident_bytes(), 0.0
        clients = [stack.enter_context(connect(running)) for _ in range(24)]
        for client in clients:
            client.sendall(f"{HEAD}Content-Length: {16 * MIB}\r\n\r\n".encode())
        for _ in range(15):
            for client in clients:
                client.sendall(block)
            most = max(most, resident_bytes() - before)
            assert pending_bytes(running) <= limit
        assert most < limit + 48 * MIB
        assert running.client.post("/encode", content=png).status_code == 200
        rejected = running.app.state.parts.metrics.rejected_requests.labels("bytes")._value.get()
        assert rejected >= 24 - limit // (15 * MIB)


def test_answers_count_until_they_are_read(serve: Any, tokenizer: Tokenizer) -> None:
    latents = bytes(64 * 32 * 8 * 8 * 2)
    query = "dtype=float16&shape=64&shape=32&shape=8&shape=8&format=raw&output_dtype=float32"
    request = f"POST /decode?{query} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(latents)}\r\n\r\n".encode()
    answer_bytes = 64 * 3 * 64 * 64 * 4
    with serve(create_app(Settings(answer_timeout_s=300), tokenizer)) as running:
        with connect(running) as greedy:
            greedy.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            greedy.sendall((request + latents) * 5)
            eventually(lambda: pending_bytes(running) == answer_bytes)
            parts = running.app.state.parts
            assert parts.admission.num_requests == 1
            time.sleep(0.2)
            assert pending_bytes(running) == answer_bytes
        eventually(lambda: pending_bytes(running) == 0)
