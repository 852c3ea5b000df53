"""A load generator in a process of its own, lean because it shares the cores with what it measures.

Requests are bytes made beforehand; of an answer only the status and a few headers are read. Run by
`run_client`, which writes a `Load` to the child's standard input and reads a `Report` from its output.
"""

import asyncio
import contextlib
import importlib.util
import json
import resource
import subprocess
import sys
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

BOUNDARY = "drorae-benchmark-boundary"
_BUFFER_BYTES = 2**20
_RETRY_S = 0.02  # after a refused connection, and after an answer that is no 200 and names no Retry-After
_TICK_S = 0.001
_END_OF_HEADERS = b"\r\n\r\n"


@dataclass(frozen=True)
class Load:
    """What a client does.

    Attributes:
        url: scheme, host and port.
        target: path and query.
        folder: of the photos.
        clients: connections; in an open loop the most there may be.
        duration_s: measured time, seconds, after ``warmup_s``.
        images_per_request: one is sent as it is, several as multipart/form-data.
        rate_per_s: arrivals a second of an open loop; 0 is a closed loop, one request in flight each.
        deadline_s: sent as X-Request-Timeout and held against every 200; 0 sends none.
        grace_s: how long the last answers may take once the time is over, seconds.
    """

    url: str
    target: str
    folder: str
    clients: int
    duration_s: float
    warmup_s: float = 1.0
    images_per_request: int = 1
    rate_per_s: float = 0.0
    deadline_s: float = 0.0
    grace_s: float = 90.0


@dataclass(frozen=True)
class Latency:
    """Quantiles of durations, milliseconds."""

    num: int = 0
    p50_ms: float = 0.0
    p90_ms: float = 0.0
    p99_ms: float = 0.0
    max_ms: float = 0.0

    @classmethod
    def of(cls, durations_s: list[float]) -> "Latency":
        """Quantiles of durations in seconds: the smallest value that so many do not exceed."""
        if not durations_s:
            return cls()
        ordered = sorted(durations_s)

        def at(share: float) -> float:
            return 1e3 * ordered[min(len(ordered) - 1, int(share * len(ordered)))]

        return cls(len(ordered), at(0.5), at(0.9), at(0.99), 1e3 * ordered[-1])


@dataclass(frozen=True)
class Report:
    """What a client saw of the measured time.

    Attributes:
        duration_s: from the first measured arrival to the end of the measured time.
        num_ok_completed: 200s that came within that time, whenever their requests were due.
        num_total: answers of the whole run, the warm-up included.
        statuses: answers by status, of the requests that were due within the time.
        latencies: of those from when they were due, by status: waits for a free connection count.
        answer_times: of those from the moment of sending, by status.
        errors: failures by kind: ``connect``, ``reset`` before an answer, ``timeout`` at the end.
        num_unsent: due, but there was no free connection before the end.
        num_late: 200s that came after ``deadline_s``, from the moment of sending.
        num_without_retry_after: 429s and 503s without a Retry-After.
        retry_after_s: its largest value.
        cpu_s: the client's own CPU time over the whole run, seconds.
    """

    duration_s: float
    num_ok_completed: int
    num_total: int
    statuses: dict[int, int]
    latencies: dict[int, Latency]
    answer_times: dict[int, Latency]
    errors: dict[str, int]
    num_unsent: int
    num_late: int
    num_without_retry_after: int
    retry_after_s: int
    cpu_s: float

    @property
    def ok_per_s(self) -> float:
        """Answers of status 200 a second."""
        return self.num_ok_completed / self.duration_s

    def num(self, low: int, high: int) -> int:
        """Answers whose status is within [low, high]."""
        return sum(count for status, count in self.statuses.items() if low <= status <= high)


class ClientError(Exception):
    """The load generator itself failed; shows what it said."""


def run_client(load: Load) -> Report:
    """Run a client in a process of its own.

    Raises:
        ClientError: it did not finish.
    """
    limit_s = load.warmup_s + load.duration_s + load.grace_s + 60
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serving.client"],
        input=json.dumps(asdict(load)),
        capture_output=True,
        text=True,
        timeout=limit_s,
        cwd=Path(__file__).parents[2],
        check=False,
    )
    if done.returncode:
        raise ClientError(f"the client ended with status {done.returncode}:\n{done.stderr[-2000:]}")
    return _parse_report(json.loads(done.stdout))


def _parse_report(document: dict[str, object]) -> Report:
    values = dict(document)
    for name in ("latencies", "answer_times"):
        tables = values[name]
        assert isinstance(tables, dict)
        values[name] = {int(status): Latency(**table) for status, table in tables.items()}
    statuses = values["statuses"]
    assert isinstance(statuses, dict)
    values["statuses"] = {int(status): count for status, count in statuses.items()}
    return Report(**values)  # type: ignore[arg-type]  # what asdict made of one


def build_requests(load: Load, photos: list[bytes]) -> list[bytes]:
    """Whole requests, headers and body, as many as there are photos."""
    host = urlsplit(load.url).netloc
    deadline = f"X-Request-Timeout: {load.deadline_s:g}\r\n" if load.deadline_s else ""
    requests = []
    for first in range(len(photos)):
        chosen = [photos[(first + k) % len(photos)] for k in range(load.images_per_request)]
        media_type, body = ("image/jpeg", chosen[0]) if len(chosen) == 1 else _multipart(chosen)
        head = (
            f"POST {load.target} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {media_type}\r\n"
            f"Content-Length: {len(body)}\r\n{deadline}\r\n"
        )
        requests.append(head.encode("ascii") + body)
    return requests


def _multipart(photos: list[bytes]) -> tuple[str, bytes]:
    head = (
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="images"; filename="photo.jpg"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    ).encode("ascii")
    parts = b"".join(head + photo + b"\r\n" for photo in photos)
    return f"multipart/form-data; boundary={BOUNDARY}", parts + f"--{BOUNDARY}--\r\n".encode("ascii")


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
