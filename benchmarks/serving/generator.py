"""A load generator in a process of its own, lean because it shares the cores with the service.

Requests are bytes made beforehand; of an answer only the status and a few headers are read. Reads a
`Load` from standard input and writes a `Report` to standard output.
"""

import asyncio
import contextlib
import importlib.util
import json
import resource
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

from benchmarks.serving.client import ClientError, Latency, Load, Report, build_requests

_BUFFER_BYTES = 2**20
_RETRY_S = 0.02  # after a refused connection, and after an answer that is no 200 and names no Retry-After
_TICK_S = 0.001
_END_OF_HEADERS = b"\r\n\r\n"


@dataclass
class _Records:
    """What is noted of every answer: when it was due, sent and there, on the loop's clock."""

    due_s: list[float] = field(default_factory=list)
    sent_s: list[float] = field(default_factory=list)
    done_s: list[float] = field(default_factory=list)
    status: list[int] = field(default_factory=list)
    errors: Counter[str] = field(default_factory=Counter)
    num_without_retry_after: int = 0
    retry_after_s: int = 0

    def add(self, connection: "_Connection", done_s: float) -> None:
        self.due_s.append(connection.due_s)
        self.sent_s.append(connection.sent_s)
        self.done_s.append(done_s)
        self.status.append(connection.status)
        if connection.status in (429, 503):
            if connection.retry_after_s is None:
                self.num_without_retry_after += 1
            else:
                self.retry_after_s = max(self.retry_after_s, connection.retry_after_s)


class _Connection(asyncio.BufferedProtocol):
    """One connection with at most one request in flight.

    Args:
        buffer: where answers are received; all connections share it, for bodies are only counted.
        on_answer: called with the connection once an answer is complete.
        on_close: called with the connection when it is closed, its request answered or not.
    """

    def __init__(
        self,
        buffer: memoryview,
        on_answer: Callable[["_Connection"], None],
        on_close: Callable[["_Connection"], None],
    ) -> None:
        self._buffer = buffer
        self._on_answer = on_answer
        self._on_close = on_close
        self._transport: asyncio.Transport | None = None
        self._head = b""
        self._missing = 0
        self.busy = False
        self.status = 0
        self.retry_after_s: int | None = None
        self.closing = False
        self.due_s = self.sent_s = 0.0

    @property
    def usable(self) -> bool:
        """Whether a request can be sent on it."""
        return self._transport is not None and not self.closing

    def send(self, request: bytes, due_s: float, now_s: float) -> None:
        """Send one request; the one before has been answered."""
        assert self._transport is not None
        self.busy, self.due_s, self.sent_s = True, due_s, now_s
        self._head, self._missing, self.status, self.retry_after_s = b"", -1, 0, None
        self._transport.write(request)

    def close(self) -> None:
        """Close the connection without a word."""
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has the methods, not the class

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        self._on_close(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if not self.busy:
            return  # after an answer nothing is due: what comes is the end of a refused connection
        if self._missing < 0:
            self._head += bytes(self._buffer[:nbytes])
            head, end, body = self._head.partition(_END_OF_HEADERS)
            if not end:
                return
            self._read_head(head)
            nbytes = len(body)
        self._missing -= nbytes
        if self._missing <= 0:
            self.busy = False
            if self.closing:
                self.close()
            self._on_answer(self)

    def _read_head(self, head: bytes) -> None:
        lowered = head.lower()
        self.status = int(lowered[9:12])
        length = _header(lowered, b"content-length")
        if length is None:
            raise ClientError("an answer has no Content-Length")
        self._missing = int(length)
        if self.status != 200:
            retry_after = _header(lowered, b"retry-after")
            self.retry_after_s = int(retry_after) if retry_after else None
        self.closing = b"\r\nconnection: close" in lowered


def _header(lowered: bytes, name: bytes) -> bytes | None:
    begin = lowered.find(b"\r\n" + name + b":")
    if begin < 0:
        return None
    begin += len(name) + 3
    end = lowered.find(b"\r\n", begin)
    return lowered[begin : end if end >= 0 else len(lowered)].strip()


class _Generator:
    """Drives the connections of one run."""

    def __init__(self, load: Load, requests: list[bytes]) -> None:
        self._load = load
        self._requests = requests
        self._loop = asyncio.get_running_loop()
        self._buffer = memoryview(bytearray(_BUFFER_BYTES))
        self._parts = urlsplit(load.url)
        self._records = _Records()
        self._idle: list[_Connection] = []
        self._waiting: deque[float] = deque()
        self._tasks: set[asyncio.Task[None]] = set()
        self._connections: set[_Connection] = set()
        self._num_opening = self._num_sent = self._num_busy = 0
        self._stopping = False
        self._finished = asyncio.Event()

    async def run(self) -> Report:
        """The whole run: warm-up, measured time, last answers."""
        load = self._load
        cpu_s = _cpu_s()
        begin_s = time.perf_counter()
        measured_s = begin_s + load.warmup_s
        end_s = measured_s + load.duration_s
        if load.rate_per_s:
            await self._send_arrivals(begin_s, end_s)
        else:
            for _ in range(load.clients):
                self._open()
            await asyncio.sleep(end_s - time.perf_counter())
        self._stopping = True
        num_unsent = sum(due_s >= measured_s for due_s in self._waiting)
        self._waiting.clear()
        if self._num_busy:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._finished.wait(), load.grace_s)
        self._records.errors["timeout"] += self._num_busy
        for connection in list(self._connections):
            connection.close()
        return self._report(measured_s, end_s, num_unsent, _cpu_s() - cpu_s)

    async def _send_arrivals(self, begin_s: float, end_s: float) -> None:
        interval_s = 1 / self._load.rate_per_s
        num_due = 0
        while (now_s := time.perf_counter()) < end_s:
            while (due_s := begin_s + num_due * interval_s) <= now_s:
                num_due += 1
                self._arrive(due_s)
            await asyncio.sleep(min(_TICK_S, max(0.0, due_s - now_s)))

    @property
    def _num_open(self) -> int:
        return len(self._connections) + self._num_opening

    def _arrive(self, due_s: float) -> None:
        self._waiting.append(due_s)
        if self._idle:
            self._use(self._idle.pop())
        elif self._num_opening < len(self._waiting) and self._num_open < self._load.clients:
            self._open()

    def _use(self, connection: _Connection) -> None:
        """Give a free connection what is due, or keep it."""
        if self._stopping or not connection.usable:
            return
        closed_loop = not self._load.rate_per_s
        if not closed_loop and not self._waiting:
            self._idle.append(connection)
            return
        now_s = time.perf_counter()
        due_s = now_s if closed_loop else self._waiting.popleft()
        request = self._requests[self._num_sent % len(self._requests)]
        self._num_sent += 1
        self._num_busy += 1
        connection.send(request, due_s, now_s)

    def _answered(self, connection: _Connection) -> None:
        self._records.add(connection, time.perf_counter())
        self._release()
        if connection.closing:
            return  # its end opens another
        if connection.status != 200 and not self._load.rate_per_s:
            self._loop.call_later(connection.retry_after_s or _RETRY_S, self._use, connection)
        else:
            self._use(connection)

    def _release(self) -> None:
        self._num_busy -= 1
        if self._stopping and not self._num_busy:
            self._finished.set()

    def _closed(self, connection: _Connection) -> None:
        self._connections.discard(connection)
        if connection in self._idle:
            self._idle.remove(connection)
        if connection.busy:
            connection.busy = False
            self._records.errors["reset"] += 1
            self._release()
        if not self._stopping and (self._waiting or not self._load.rate_per_s):
            self._open()

    def _open(self) -> None:
        self._num_opening += 1
        task = self._loop.create_task(self._connect())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _connect(self) -> None:
        host, port = self._parts.hostname or "127.0.0.1", self._parts.port or 80
        connection = _Connection(self._buffer, self._answered, self._closed)
        while not self._stopping:
            try:
                await self._loop.create_connection(lambda: connection, host, port)
                break
            except OSError:
                self._records.errors["connect"] += 1
                await asyncio.sleep(_RETRY_S)
        self._num_opening -= 1
        if connection.usable:
            self._connections.add(connection)
            self._use(connection)

    def _report(self, measured_s: float, end_s: float, num_unsent: int, cpu_s: float) -> Report:
        records, load = self._records, self._load
        rows = [
            (status, due_s, sent_s, done_s)
            for status, due_s, sent_s, done_s in zip(
                records.status, records.due_s, records.sent_s, records.done_s, strict=True
            )
            if measured_s <= due_s < end_s
        ]
        statuses = Counter(row[0] for row in rows)
        deadline_s = load.deadline_s or float("inf")
        return Report(
            duration_s=load.duration_s,
            num_ok_completed=sum(
                status == 200 and measured_s <= done_s < end_s
                for status, done_s in zip(records.status, records.done_s, strict=True)
            ),
            num_total=len(records.status),
            statuses=dict(statuses),
            latencies={s: Latency.of([row[3] - row[1] for row in rows if row[0] == s]) for s in statuses},
            answer_times={s: Latency.of([row[3] - row[2] for row in rows if row[0] == s]) for s in statuses},
            errors={kind: count for kind, count in records.errors.items() if count},
            num_unsent=num_unsent,
            num_late=sum(row[0] == 200 and row[3] - row[2] > deadline_s for row in rows),
            num_without_retry_after=records.num_without_retry_after,
            retry_after_s=records.retry_after_s,
            cpu_s=cpu_s,
        )


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


def _new_loop() -> asyncio.AbstractEventLoop:
    if importlib.util.find_spec("uvloop") is None:
        return asyncio.new_event_loop()
    import uvloop

    loop: asyncio.AbstractEventLoop = uvloop.new_event_loop()
    return loop


def main() -> int:
    """Read a `Load` from standard input, run it, write the `Report` to standard output."""
    load = Load(**json.load(sys.stdin))
    photos = [path.read_bytes() for path in sorted(Path(load.folder).glob("*.jpg"))]

    async def run() -> Report:
        return await _Generator(load, build_requests(load, photos)).run()

    with asyncio.Runner(loop_factory=_new_loop) as runner:
        report = runner.run(run())
    json.dump(asdict(report), sys.stdout)
    return 0


if __name__ == "__main__":
    sys.exit(main())
