"""Admission: a request's whole cost is reserved at once, or the request is refused at once.

Everything here runs on the event loop's thread; only the measured rates come from the engine's threads.
"""

import math
import time
from types import TracebackType
from typing import Self

from service.batching import Operation
from service.engine import Engine
from service.errors import QueueFullError
from service.metrics import Metrics
from service.settings import Settings

MAX_RETRY_AFTER_S = 600
DEADLINE_MARGIN = 1.5
"""Of the estimated wait: what is accepted should keep its deadline even if the rate drops, as it does on a
CPU that has refusals to answer beside its work."""


class Admission:
    """The room that requests share: items accepted and not yet answered, bytes of bodies held.

    Args:
        settings: the limits.
        engine: its measured rates tell Retry-After, and whether a deadline can be kept.
        metrics: where room and refusals are counted.
    """

    def __init__(self, settings: Settings, engine: Engine, metrics: Metrics) -> None:
        self._settings = settings
        self._engine = engine
        self._metrics = metrics
        self._items = dict.fromkeys(Operation, 0)
        self._bytes = 0
        self.num_requests = 0
        metrics.pending_items.set_function(lambda: sum(self._items.values()))
        metrics.pending_bytes.set_function(lambda: self._bytes)

    def reserve(
        self, operation: Operation, num_items: int, num_bytes: int, deadline_s: float
    ) -> "Reservation":
        """Reserve room for a request, to be released when it is answered.

        Args:
            operation: what its items need.
            num_items: how many there are, as far as its headers tell.
            num_bytes: most that its body can have.
            deadline_s: when it must be done, on the clock of `time.monotonic`.

        Raises:
            QueueFullError: no room, or no hope to keep the deadline.
        """
        self._check_items(num_items)
        held, limit = self._bytes, self._settings.queue_limit_bytes
        if held + num_bytes > limit:
            raise self._full(
                "bytes",
                f"The service holds {held} of at most {limit} bytes of request bodies, "
                f"and up to {num_bytes} more came.",
            )
        backlog_s = self.backlog_s()
        left_s = deadline_s - time.monotonic()
        if backlog_s * DEADLINE_MARGIN > left_s:
            raise self._full(
                "deadline",
                f"The work accepted before takes about {backlog_s:.1f} s, too long for this request's "
                f"deadline of {left_s:.1f} s.",
            )
        return Reservation(self, operation, num_items, num_bytes)

    def backlog_s(self) -> float:
        """How long the engines need for what was accepted, seconds, at their measured rates."""
        return self._engine.rates.duration_s(self._items, self._engine.num_workers)

    def _check_items(self, num_items: int) -> None:
        pending, limit = sum(self._items.values()), self._settings.queue_limit_items
        if pending + num_items > limit:
            raise self._full(
                "items",
                f"The queue is full: {pending} of at most {limit} items are accepted and not yet answered, "
                f"and {num_items} more came.",
            )

    def _full(self, reason: str, detail: str) -> QueueFullError:
        self._metrics.rejected_requests.labels(reason).inc()
        retry_after_s = max(self._settings.retry_after_s, math.ceil(self.backlog_s()))
        return QueueFullError(detail, {"Retry-After": str(min(retry_after_s, MAX_RETRY_AFTER_S))})

    def _add(self, operation: Operation, num_items: int, num_bytes: int) -> None:
        self._items[operation] += num_items
        self._bytes += num_bytes


class Reservation:
    """One request's room; a context manager that gives it back."""

    def __init__(self, admission: Admission, operation: Operation, num_items: int, num_bytes: int) -> None:
        self._admission = admission
        self._operation = operation
        self._num_items = num_items
        self._num_bytes = num_bytes

    def __enter__(self) -> Self:
        self._admission.num_requests += 1
        self._admission._add(self._operation, self._num_items, self._num_bytes)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._admission.num_requests -= 1
        self._admission._add(self._operation, -self._num_items, -self._num_bytes)

    def resize_items(self, num_items: int) -> None:
        """Set the number of items, now that the body has told it.

        Raises:
            QueueFullError: there is no room for the further ones; the reservation stays as it was.
        """
        further = num_items - self._num_items
        if further > 0:
            self._admission._check_items(further)
        self._admission._add(self._operation, further, 0)
        self._num_items = num_items

    def resize_bytes(self, num_bytes: int) -> None:
        """Lower the number of bytes, once the body is there, or gone."""
        self._admission._add(self._operation, 0, num_bytes - self._num_bytes)
        self._num_bytes = num_bytes
