"""What is known about one request while it is answered: its id, its deadline, where its time went."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from service.tracing import TraceContext


@dataclass
class RequestContext:
    """Kept in ``request.state.context`` from the first byte to the answer.

    Attributes:
        request_id: the client's ``X-Request-ID`` where it sent a usable one.
        deadline_s: when the request's time is up, on the clock of `time.monotonic`.
        outcome: ``ok``, or the slug of the problem that was answered.
        durations_s: seconds spent by stage, in order.
        trace: where the request stands in a distributed trace.
        stages: every stage as it ran: its name, when it began on that clock, seconds it took.
    """

    request_id: str
    deadline_s: float
    started_s: float = field(default_factory=time.monotonic)
    outcome: str = "ok"
    durations_s: dict[str, float] = field(default_factory=dict)
    trace: TraceContext = field(default_factory=TraceContext.fresh)
    stages: list[tuple[str, float, float]] = field(default_factory=list)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        started_s = time.monotonic()
        try:
            yield
        finally:
            self.record(stage, started_s, time.monotonic() - started_s)

    def record(self, stage: str, started_s: float, duration_s: float) -> None:
        """Add to a stage time that was taken elsewhere; ``started_s`` is on the clock of `time.monotonic`."""
        self.durations_s[stage] = self.durations_s.get(stage, 0.0) + duration_s
        self.stages.append((stage, started_s, duration_s))

    def elapsed_s(self) -> float:
        """Seconds since the request came."""
        return time.monotonic() - self.started_s

    def server_timing(self) -> str:
        """The ``Server-Timing`` header: milliseconds by stage and in total."""
        stages = {**self.durations_s, "total": self.elapsed_s()}
        return ", ".join(f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in stages.items())
