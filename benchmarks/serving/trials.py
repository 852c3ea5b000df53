"""One trial: a client's run against a service, with the service's CPU time and memory beside it."""

import statistics
import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from benchmarks.harness.service import Service
from benchmarks.serving.client import Load, Report, run_client

_SAMPLE_INTERVAL_S = 0.25
_SETTLE_S = 2.0
_WARMUP_SHARE = 0.2


@dataclass(frozen=True)
class Options:
    """Options of every scenario.

    Attributes:
        folder: of the staged photos.
        checkpoint: served and run bare.
        settings: of our service, by field name, beside the checkpoint.
        rounds: how often systems take turns.
        duration_s: of one closed-loop trial, and of one bare run, seconds.
        open_duration_s: of one open-loop trial, seconds.
        clients: connections of a closed loop at saturation.
        max_connections: most connections of an open loop.
        deadline_s: of the overloaded service's clients, seconds.
        device_ms: time of a batch on the simulated device, milliseconds.
        batches: sizes that the bare loop tries.
        peer_python: interpreter of an environment with LitServe; None leaves it out.
    """

    folder: Path
    checkpoint: str
    settings: dict[str, str]
    rounds: int
    duration_s: float
    open_duration_s: float
    clients: int
    max_connections: int
    deadline_s: float
    device_ms: float
    batches: Sequence[int]
    peer_python: str | None

    @property
    def warmup_s(self) -> float:
        """Of a client before it measures: queues must have filled, seconds."""
        return _WARMUP_SHARE * self.duration_s

    @property
    def service_settings(self) -> dict[str, str]:
        """Settings of our service: its defaults but for what was asked for."""
        return {"checkpoint": self.checkpoint, "log_level": "warning", **self.settings}


@dataclass(frozen=True)
class Trial:
    """Client's and service's figures of one run; memory in bytes."""

    report: Report
    cpu_s: float
    parts_cpu_s: Mapping[str, float]
    rss_before: int
    rss_peak: int
    rss_after: int

    @property
    def cpu_ms_per_request(self) -> float:
        """CPU time of all the service's processes for each answer, milliseconds."""
        return 1e3 * self.cpu_s / max(1, self.report.num_total)

    def part_cpu_ms_per_request(self, part: str) -> float:
        """The same of one of the `PARTS`."""
        return 1e3 * self.parts_cpu_s[part] / max(1, self.report.num_total)

    @property
    def client_cpu_ms_per_request(self) -> float:
        """The same of the client."""
        return 1e3 * self.report.cpu_s / max(1, self.report.num_total)


def run_trial(service: Service, load: Load) -> Trial:
    """Run one client and watch the service meanwhile.

    Raises:
        benchmarks.serving.client.ClientError: the client failed.
    """
    before, cpu_s, parts_cpu_s = service.rss_bytes(), service.cpu_seconds(), service.cpu_seconds_by_part()
    with _MemoryWatch(service) as watch:
        report = run_client(load)
        cpu_s = service.cpu_seconds() - cpu_s
        parts_cpu_s = {
            part: seconds - parts_cpu_s[part] for part, seconds in service.cpu_seconds_by_part().items()
        }
        watch.stopped.wait(min(_SETTLE_S, load.duration_s) if load.rate_per_s else 0)
    return Trial(report, cpu_s, parts_cpu_s, before, max([before, *watch.samples]), service.rss_bytes())


def median(values: Sequence[float]) -> float:
    """Of the rounds."""
    return statistics.median(values)


class _MemoryWatch:
    """Reads the service's memory until the block ends."""

    def __init__(self, service: Service) -> None:
        self.samples: list[int] = []
        self.stopped = threading.Event()
        self._service = service
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopped.set()
        self._thread.join()

    def _run(self) -> None:
        while not self.stopped.wait(_SAMPLE_INTERVAL_S):
            try:
                self.samples.append(self._service.rss_bytes())
            except (FileNotFoundError, ProcessLookupError):
                continue  # a child of the service ended while it was read
