"""The context of a request while it is answered: its id, its deadline, its stages."""

import random
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from opentelemetry.trace import Span


_random = random.Random()  # seeded by the system, also where a program seeds the module's own


def random_bits(num_bits: int) -> int:
    """A number for an id, which has to be unique and not secret: no system call for each."""
    return _random.getrandbits(num_bits)


class Stage(NamedTuple):
    """A part of a request's time: name, begin on the clock of `time.monotonic`, duration; seconds."""

    name: str
    started_s: float
    duration_s: float


@dataclass
class RequestContext:
    """Kept in ``request.state.context`` from the first byte to the answer.

    Attributes:
        request_id: the client's ``X-Request-ID`` where it sent a usable one.
        deadline_s: end of the request's time, on the clock of `time.monotonic`.
        outcome: ``ok``, or the slug of the problem that was answered.
        stages: parts of its time, in order: read, decode, queue, batch, device, encode.
        span: its span in a distributed trace; None without the extra ``drorae[otel]``.
        trace_headers: name the span to others.
        abandoned: whether its client went away before the answer was written.
        work: closed once the answer is written, or cannot be written.
        resources: closed once the answer is sent.
    """

    request_id: str
    deadline_s: float
    started_s: float = field(default_factory=time.monotonic)
    outcome: str = "ok"
    stages: list[Stage] = field(default_factory=list)
    span: "Span | None" = None
    trace_headers: dict[str, str] = field(default_factory=dict)
    abandoned: bool = False
    work: ExitStack = field(default_factory=ExitStack)
    resources: ExitStack = field(default_factory=ExitStack)

    @contextmanager
    def measure(self, stage: str) -> Iterator[None]:
        """Record the time of the block as a stage."""
        started_s = time.monotonic()
        try:
            yield
        finally:
            self.record(stage, started_s, time.monotonic())

    def record(self, stage: str, started_s: float, ended_s: float) -> None:
        """Record a stage whose begin and end are known."""
        self.stages.append(Stage(stage, started_s, max(0.0, ended_s - started_s)))

    def elapsed_s(self) -> float:
        """Seconds since the request came."""
        return time.monotonic() - self.started_s

    def server_timing(self) -> str:
        """The ``Server-Timing`` header: milliseconds by stage and in total.

        A stage that came twice, such as ``device`` where the model ran twice, is told as one.
        """
        durations: dict[str, float] = {}
        for stage in self.stages:
            durations[stage.name] = durations.get(stage.name, 0.0) + stage.duration_s
        durations["total"] = self.elapsed_s()
        return ", ".join(f"{name};dur={seconds * 1000:.1f}" for name, seconds in durations.items())
