"""What is known about one request while it is answered: its id, its deadline, where its time went."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field


@dataclass
class RequestContext:
    """Kept in ``request.state.context`` from the first byte to the answer.

    Attributes:
        request_id: the client's ``X-Request-ID`` where it sent a usable one.
        deadline_s: when the request's time is up, on the clock of `time.monotonic`.
        outcome: ``ok``, or the slug of the problem that was answered.
        durations_s: seconds spent by stage, in order.
    """

    request_id: str
    deadline_s: float
    started_s: float = field(default_factory=time.monotonic)
    outcome: str = "ok"
    durations_s: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Add the time of the block to a stage."""
        started_s = time.monotonic()
        try:
            yield
        finally:
            self.durations_s[stage] = self.durations_s.get(stage, 0.0) + time.monotonic() - started_s

    def elapsed_s(self) -> float:
        """Seconds since the request came."""
        return time.monotonic() - self.started_s

    def server_timing(self) -> str:
        """The ``Server-Timing`` header: milliseconds by stage and in total."""
        stages = {**self.durations_s, "total": self.elapsed_s()}
        return ", ".join(f"{stage};dur={seconds * 1000:.1f}" for stage, seconds in stages.items())
