"""A worker: the thread that takes batches, runs them on its device, and delivers their results.

When a batch fails it is split and run again, down to single items, so that only the guilty fail.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import torch

from model.cuda_graphs import bucket_for
from model.errors import ModelError
from model.images.tensors import dtype_name
from service.engine.operations import BatchKey, Operation
from service.engine.queue import FairQueue, Ticket
from service.engine.rates import Rates
from service.engine.runners import Launched, Outcome, Runner
from service.errors import (
    DeadlineError,
    DeviceMemoryError,
    InternalError,
    LatentsError,
    ServiceError,
    from_model,
    overflowing,
)
from service.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)


class BrokenRunnerError(Exception):
    """The device fails even on inputs that it ran before."""


@dataclass(frozen=True)
class _Flight:
    """A batch on the device."""

    tickets: list[Ticket]
    launched: Launched


class Worker(threading.Thread):
    """Warms a runner, then runs its batches until the queue is closed and empty, or the device is broken.

    Args:
        runner: used by this thread alone.
        queue: where tickets come from.
        probe: runs a known input on the runner; raises where that fails.
        rates: where the cost of batches is noted.
        metrics: where batches and items are counted.
    """

    def __init__(
        self,
        runner: Runner,
        queue: FairQueue,
        probe: Callable[[], None],
        rates: Rates,
        metrics: Metrics,
    ) -> None:
        super().__init__(name=f"drorae-{runner.name}", daemon=True)
        self.warmed = threading.Event()
        """Set once every bucket has been run, or that has failed."""
        self.failure: BaseException | None = None
        """Why it ended before its time."""
        self.busy_since_s: float | None = None
        """Begin of its current batch or of warming up; None while it is idle."""
        self.computes = not runner.name.startswith("cuda")
        """Whether its batches are computed by its own thread."""
        self.batch_s = 0.0
        """Duration of the slowest batch of the largest size, measured while warming."""
        self._runner = runner
        self._queue = queue
        self._probe = probe
        self._rates = rates
        self._metrics = metrics
        self._flights: deque[_Flight] = deque()
        self._ended_s = 0.0  # when the last batch did
        self._idle_s = 0.0  # waited for work since then

    @property
    def max_items(self) -> int:
        """Items of its largest batch."""
        return self._runner.buckets[-1]

    def run(self) -> None:
        try:
            self._warm()
            self._work()
        except BaseException as exc:  # the thread's boundary: the engine reports it
            self.failure = exc
        finally:
            self.warmed.set()

    def _warm(self) -> None:
        self.busy_since_s = time.monotonic()
        for operation, duration_s in self._runner.warm().items():
            self._rates.record(operation, self.max_items, duration_s)
            self.batch_s = max(self.batch_s, duration_s)
        self.busy_since_s = None
        self.warmed.set()

    def _work(self) -> None:
        """Launch batches, up to the runner's depth, and end them in order."""
        self._account_from_now()
        while True:
            asked_s = time.monotonic()
            tickets = self._take()
            if not tickets and not self._flights:
                return
            self.busy_since_s = time.monotonic()
            self._idle_s += self.busy_since_s - asked_s
            if live := [ticket for ticket in tickets if self._begin(ticket)]:
                self._launch(live)
            if self._flights and (len(self._flights) == self._runner.depth or not live):
                self._end_first()
            self.busy_since_s = None

    def _take(self) -> list[Ticket]:
        """The next batch; beside one in flight only a full one that is there already."""
        return self._queue.take_full(self.max_items) if self._flights else self._queue.take(self.max_items)

    def _begin(self, ticket: Ticket) -> bool:
        """Whether the ticket is still wanted, and in time."""
        job = ticket.job
        operation = job.key.operation
        now_s = time.monotonic()
        job.times.taken_s = now_s
        self._metrics.queue_seconds.labels(operation.name).observe(now_s - job.times.enqueued_s)
        if job.settled:
            self._count(operation, "cancelled")
            return False
        if now_s >= job.deadline_s:
            job.fail(DeadlineError("The deadline passed while the request waited for the model."))
            self._count(operation, "expired")
            return False
        return True

    def _launch(self, tickets: list[Ticket]) -> None:
        try:
            self._flights.append(_Flight(tickets, self._start_batch(tickets)))
        except Exception as exc:  # the worker's boundary: a bad item must not end the thread
            self._recover(tickets, exc)

    def _start_batch(self, tickets: list[Ticket]) -> Launched:
        return self._runner.launch(tickets[0].job.key, [ticket.tensor for ticket in tickets])

    def _end_first(self) -> None:
        flight = self._flights.popleft()
        try:
            outcome = flight.launched.wait()
        except Exception as exc:  # the worker's boundary
            self._recover(flight.tickets, exc)
        else:
            self._deliver(flight.tickets, outcome)

    def _recover(self, tickets: list[Ticket], error: Exception) -> None:
        """End the batches in flight after one failed, then run the failed ones again.

        A failure beside another batch may be that one's fault, or only want its memory. What failed so is
        run again whole, with nothing beside it, before anything is made of its failure.
        """
        if not self._flights:
            self._split(tickets, error)
            return
        failed = [tickets]
        self._note_failure(tickets, error)
        while self._flights:
            flight = self._flights.popleft()
            self.busy_since_s = time.monotonic()  # each batch has the whole time of one
            try:
                outcome = flight.launched.wait()
            except Exception as exc:  # the worker's boundary
                failed.append(flight.tickets)
                self._note_failure(flight.tickets, exc)
            else:
                self._deliver(flight.tickets, outcome)
        for batch in failed:
            self._run(batch)

    def _run(self, tickets: list[Ticket]) -> None:
        """Run those tickets of a failed batch that are still wanted, alone on the device."""
        self.busy_since_s = time.monotonic()
        wanted = [ticket for ticket in tickets if not ticket.job.settled]
        self._count(tickets[0].job.key.operation, "cancelled", len(tickets) - len(wanted))
        if not wanted:
            return
        try:
            outcome = self._start_batch(wanted).wait()
        except Exception as exc:  # the worker's boundary
            self._split(wanted, exc)
        else:
            self._deliver(wanted, outcome)

    def _split(self, tickets: list[Ticket], error: Exception) -> None:
        """Run the halves of a batch that failed, so that only the guilty item's request fails."""
        self._note_failure(tickets, error)
        if len(tickets) == 1:
            self._blame(tickets[0], error)
            self._account_from_now()
            return
        middle = len(tickets) // 2
        for half in (tickets[:middle], tickets[middle:]):
            self._run(half)

    def _note_failure(self, tickets: list[Ticket], error: Exception) -> None:
        """Charge a failed batch's time to its operation alone, and make room where there was too little."""
        assert self.busy_since_s is not None
        self._queue.charge(tickets[0].job.key.operation, time.monotonic() - self.busy_since_s)
        self._account_from_now()
        if is_out_of_memory(error):
            self._runner.free_memory()
        if len(tickets) > 1:
            logger.warning("a batch of %d failed and is run again: %s", len(tickets), _first_line(error))
            self._metrics.batch_failures.labels(_reason(error)).inc()

    def _account_from_now(self) -> None:
        """Count the cost of the next batch from now on."""
        self._ended_s, self._idle_s = time.monotonic(), 0.0

    def _blame(self, ticket: Ticket, error: Exception) -> None:
        """Fail one item's request; then see whether the device still works."""
        if is_out_of_memory(error):
            logger.error("the device has no memory for a single item: %s", _first_line(error))
            self._fail(
                ticket, DeviceMemoryError("The device has no memory left for this.", {"Retry-After": "1"})
            )
        elif isinstance(error, ModelError):
            self._fail(ticket, from_model(error))
        else:
            logger.error("the model failed on an item", exc_info=error)
            self._check_runner()
            details = "The model failed on this; the service's log has the details."
            self._fail(ticket, InternalError(details))

    def _check_runner(self) -> None:
        """Run a known input.

        Raises:
            BrokenRunnerError: the device fails on it too.
        """
        self.busy_since_s = time.monotonic()
        try:
            self._probe()
        except Exception as exc:
            raise BrokenRunnerError(f"{self._runner.name} fails on known inputs too") from exc

    def _deliver(self, tickets: list[Ticket], outcome: Outcome) -> None:
        key = tickets[0].job.key
        finished_s = time.monotonic()
        # A batch costs the queue more than the device's time: the host's work for it counts too.
        # It is no less where another batch failed in between, from whose end on it is accounted.
        cost_s = max(outcome.device_s, finished_s - self._ended_s - self._idle_s)
        self._rates.record(key.operation, len(tickets), cost_s)
        self._account_from_now()
        self._record(key, len(tickets), outcome, tickets[0].job.times.taken_s)
        judged = zip(tickets, outcome.results, outcome.finite, outcome.fits, strict=True)
        for ticket, result, finite, fits in judged:
            times = ticket.job.times
            times.started_s, times.finished_s = outcome.started_s, finished_s
            if finite and fits:
                self._count(key.operation, "ok")
                ticket.job.deliver(ticket.index, result)
            elif finite:
                self._fail(ticket, overflowing(dtype_name(key.dtype)))
            else:
                overflow = "The model's result overflows: the values given are too large for it."
                self._fail(ticket, LatentsError(overflow))

    def _record(self, key: BatchKey, num_items: int, outcome: Outcome, taken_s: float) -> None:
        operation, metrics = key.operation, self._metrics
        self._queue.charge(operation, outcome.device_s)
        bucket = bucket_for(num_items, self._runner.buckets)
        metrics.batch_wait_seconds.labels(operation.name).observe(max(0.0, outcome.started_s - taken_s))
        metrics.device_seconds.labels(operation.name).observe(outcome.device_s)
        metrics.device_busy_seconds.labels(self._runner.name).inc(outcome.device_s)
        metrics.batch_items.labels(operation.name).observe(num_items)
        metrics.batch_padding_items.labels(operation.name).observe(bucket - num_items)

    def _fail(self, ticket: Ticket, error: ServiceError) -> None:
        if len(ticket.job) > 1:
            error = type(error)(f"Item {ticket.index}: {error.detail}", error.headers)
        self._count(ticket.job.key.operation, "failed")
        ticket.job.fail(error)

    def _count(self, operation: Operation, outcome: str, num_items: int = 1) -> None:
        self._metrics.items.labels(operation.name, outcome).inc(num_items)


def is_out_of_memory(error: Exception) -> bool:
    """Whether the device, or the host, had no memory left."""
    allocation_failed = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or allocation_failed


def _reason(error: Exception) -> str:
    if is_out_of_memory(error):
        return "out-of-memory"
    return "refused" if isinstance(error, ModelError) else "error"


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')[:200]}"
