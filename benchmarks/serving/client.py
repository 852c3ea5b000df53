"""A client's task and report, and the process that it runs in."""

import json
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from urllib.parse import urlsplit

BOUNDARY = "drorae-benchmark-boundary"


@dataclass(frozen=True)
class Load:
    """Task of a client.

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
    """A client's view of the measured time.

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
        """Answers of status 200 per second."""
        return self.num_ok_completed / self.duration_s

    def num(self, low: int, high: int) -> int:
        """Answers whose status is within [low, high]."""
        return sum(count for status, count in self.statuses.items() if low <= status <= high)


class ClientError(Exception):
    """The load generator itself failed; shows its output."""


def run_client(load: Load) -> Report:
    """Run a client in a process of its own.

    Raises:
        ClientError: it did not finish.
    """
    limit_s = load.warmup_s + load.duration_s + load.grace_s + 60
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.serving.generator"],
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
