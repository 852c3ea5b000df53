"""Both clients in one form, real services, and a stub that answers as it is told."""

import asyncio
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, aclosing
from typing import IO, Any

import pytest

from drorae_client import AsyncClient, Client
from tests.service.conftest import (  # noqa: F401
    _one_decoder,
    checkpoint,
    gated,
    latents,
    photo,
    png,
    serve,
    server,
    to_file,
    tokenizer,
)

Connect = Callable[..., Any]


class Waiting:
    """An `AsyncClient` with the methods of `Client`, in an event loop of its own."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self._runner = asyncio.Runner()
        self.asynchronous = AsyncClient(*args, **options)

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self._runner.run(getattr(self.asynchronous, name)(*args, **options))

    def encode_many(self, *args: Any, **options: Any) -> Iterator[Any]:
        async def collect() -> list[Any]:
            async with aclosing(self.asynchronous.encode_many(*args, **options)) as results:
                return [result async for result in results]

        return iter(self._runner.run(collect()))

    def close(self) -> None:
        self._runner.run(self.asynchronous.aclose())
        self._runner.close()


@pytest.fixture(params=[Client, Waiting], ids=["sync", "async"])
def connect(request: pytest.FixtureRequest) -> Iterator[Connect]:
    """Make a client of either kind: ``connect(url, timeout=5)``."""
    with ExitStack() as stack:

        def make(*args: Any, **options: Any) -> Any:
            client = request.param(*args, **options)
            stack.callback(client.close)
            return client

        yield make


class Stub:
    """A server whose answers are bytes, one per request; then it repeats the last. b"" closes instead.

    Attributes:
        requests: heads of the requests that came.
    """

    def __init__(self, *answers: bytes) -> None:
        self._answers = answers
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._lock = threading.Lock()
        self.requests: list[bytes] = []
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)  # wakes up the thread that accepts
        self._listener.close()

    def header(self, name: str) -> list[str]:
        """Its value in every request."""
        lines = [line for head in self.requests for line in head.decode().split("\r\n")]
        return [line.partition(": ")[2] for line in lines if line.lower().startswith(f"{name.lower()}:")]

    def _accept(self) -> None:
        while True:
            try:
                connection, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, connection.makefile("rb") as stream:
            while head := _read_head(stream):
                length = [line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")]
                stream.read(int(length[0].partition(b":")[2]) if length else 0)
                with self._lock:
                    answer = self._answers[min(len(self.requests), len(self._answers) - 1)]
                    self.requests.append(head)
                connection.sendall(answer)
                if b"connection: close" in answer.lower() or not answer:
                    return


def _read_head(stream: IO[bytes]) -> bytes:
    """A request's head; empty at the end of the connection."""
    lines = []
    for line in stream:
        if line == b"\r\n":
            return b"".join(lines)
        lines.append(line)
    return b""


def answer(body: bytes, status: int = 200, **headers: str) -> bytes:
    """An HTTP answer; underscores in the names of headers are dashes."""
    lines = "".join(f"{name.replace('_', '-')}: {value}\r\n" for name, value in headers.items())
    return f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n{lines}\r\n".encode() + body


@pytest.fixture
def stub() -> Iterator[Callable[..., Stub]]:
    """Start a stub: ``stub(answer(b"..."), b"")``."""
    with ExitStack() as stack:

        def start(*answers: bytes) -> Stub:
            started = Stub(*answers)
            stack.callback(started.close)
            return started

        yield start
