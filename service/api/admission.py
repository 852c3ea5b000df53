"""Admission: bounds on the items and bytes that requests hold. One that does not fit is refused at once.

A request holds items from the end of its body to its answer. It holds bytes from the first byte of its body
until its answer is sent: the body as far as it came, then what its inputs, results and answer take.

Everything here runs on the event loop's thread; only the measured rates come from the engine's threads, and
what other fronts hold from shared memory.
"""

import asyncio
import math
import time
from concurrent.futures import Future
from types import TracebackType
from typing import Any, Self

from service.api.view import EngineView
from service.engine.operations import OPERATIONS, Operation
from service.errors import QueueFullError
from service.processes.tally import ITEMS, Tally
from service.settings import Settings
from service.telemetry.metrics import Metrics

MAX_RETRY_AFTER_S = 600
DEADLINE_MARGIN = 1.5
"""Safety factor on the estimated wait. Throughput drops when a busy CPU also has to answer refusals."""
SMALL_BYTES = 2**20
LARGE_SHARE = 0.75
"""Share of the limit for requests that hold more than `SMALL_BYTES`. A few large bodies, or answers that
nobody reads, leave room for photos."""


class Admission:
    """The room that requests share.

    Args:
        settings: the limits.
        engine: its measured rates tell Retry-After, and whether a deadline can be kept.
        metrics: where room and refusals are counted.
        tally: where it is counted what the requests of all processes hold.
    """

    def __init__(self, settings: Settings, engine: EngineView, metrics: Metrics, tally: Tally) -> None:
        self._settings = settings
        self._engine = engine
        self._metrics = metrics
        self._tally = tally
        metrics.pending_items.set_function(self._num_items)
        metrics.pending_bytes.set_function(lambda: tally.total("bytes"))

    @property
    def num_requests(self) -> int:
        """Requests that have their place."""
        return self._tally.total("requests")

    def admit(self, operation: Operation, num_items: int, deadline_s: float) -> "Reservation":
        """Begin a request, whose reservation holds nothing yet.

        Args:
            operation: of its items.
            num_items: number of its items, as far as its headers tell.
            deadline_s: end of its time, on the clock of `time.monotonic`.

        Raises:
            QueueFullError: no room for the items, or no hope to keep the deadline.
        """
        self._check_items(self._num_items(), num_items)
        backlog_s = self.backlog_s()
        left_s = deadline_s - time.monotonic()
        if backlog_s * DEADLINE_MARGIN > left_s:
            raise self._full(
                "deadline",
                f"The work accepted before takes about {backlog_s:.1f} s, too long for this request's "
                f"deadline of {left_s:.1f} s.",
            )
        return Reservation(self, operation)

    def backlog_s(self) -> float:
        """Seconds that the engines need for the accepted items, at their measured rates."""
        items = {operation: self._tally.total(operation.name) for operation in OPERATIONS}
        return self._engine.rates.duration_s(items, self._engine.num_workers)

    def _num_items(self) -> int:
        return sum(self._tally.total(name) for name in ITEMS)

    def _check_items(self, pending: int, further: int) -> None:
        """Whether there is room for ``further`` items beside the pending ones."""
        limit = self._settings.queue_limit_items
        if pending + further > limit:
            raise self._full(
                "items",
                f"The queue is full: {pending} of at most {limit} items are accepted and not yet answered, "
                f"and {further} more came.",
            )

    def _check_bytes(self, held: int, wanted: int) -> None:
        """Whether a request may hold ``wanted``, as counted, after ``held``; one that is alone always may."""
        others, limit = self._tally.total("bytes") - wanted, self._settings.queue_limit_bytes
        share = limit if wanted <= SMALL_BYTES else int(limit * LARGE_SHARE)
        if others > 0 and others + wanted > share:
            raise self._full(
                "bytes",
                f"Requests hold {others + held} of at most {limit} bytes, and {wanted - held} more came.",
            )

    def _full(self, reason: str, detail: str) -> QueueFullError:
        self._metrics.rejected_requests.labels(reason).inc()
        retry_after_s = max(self._settings.retry_after_s, math.ceil(self.backlog_s()))
        return QueueFullError(detail, {"Retry-After": str(min(retry_after_s, MAX_RETRY_AFTER_S))})

    def _add(self, operation: Operation, num_items: int, num_bytes: int) -> None:
        self._tally.add(operation.name, num_items)
        self._tally.add("bytes", num_bytes)


class Reservation:
    """The room that one request holds; a context manager that gives it back.

    Attributes:
        num_items: images or latents.
        num_bytes: memory that the request takes.
    """

    def __init__(self, admission: Admission, operation: Operation) -> None:
        self.num_items = 0
        self.num_bytes = 0
        self._admission = admission
        self._operation = operation
        self._num_users = 0

    def __enter__(self) -> Self:
        self._admission._tally.add("requests", 1)
        self._num_users += 1
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission._tally.add("requests", -1)
        self.hold_items(0)
        self._leave()

    def hold_items(self, num_items: int) -> None:
        """Set the number of items.

        Raises:
            QueueFullError: there is no room for the further ones; the reservation stays as it was.
        """
        admission, further = self._admission, num_items - self.num_items
        admission._add(self._operation, further, 0)
        try:
            if further > 0:
                admission._check_items(admission._num_items() - further, further)
        except QueueFullError:
            admission._add(self._operation, -further, 0)
            raise
        self.num_items = num_items

    def hold_bytes(self, num_bytes: int) -> None:
        """Set the number of bytes.

        Raises:
            QueueFullError: there is no room for the further ones; the reservation stays as it was.
        """
        admission, further = self._admission, num_bytes - self.num_bytes
        admission._add(self._operation, 0, further)
        try:
            if further > 0:
                admission._check_bytes(self.num_bytes, num_bytes)
        except QueueFullError:
            admission._add(self._operation, 0, -further)
            raise
        self.num_bytes = num_bytes

    def keep_until_done(self, work: Future[Any]) -> None:
        """Hold the bytes until a thread's work is done, even if the request ends before."""
        loop = asyncio.get_running_loop()
        self._num_users += 1
        work.add_done_callback(lambda _: loop.call_soon_threadsafe(self._leave))

    def _leave(self) -> None:
        self._num_users -= 1
        if self._num_users == 0:
            self.hold_bytes(0)
