"""Jobs, and the queue that groups their items into batches.

A request becomes a `Job` of items, one image or latent each, so that items of different requests can
share a batch. Request handlers and the engines' threads share the queue alone.
"""

import math
import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field

from torch import Tensor

from model.images.tensors import collate
from service.engine.operations import OPERATIONS, BatchKey, Operation


@dataclass
class JobTimes:
    """Times of a job's last item on the clock of `time.monotonic`, seconds. 0 means not reached."""

    enqueued_s: float = field(default_factory=time.monotonic)
    taken_s: float = 0.0
    started_s: float = 0.0
    finished_s: float = 0.0


class Job:
    """One request's items on their way through the engines.

    Args:
        key: kind of its items.
        inputs: images [3, S, S], uint8 or float32 in [0, 1], or latents [C, h, w] float32; on the CPU.
        deadline_s: on the clock of `time.monotonic`; items not begun by then are not begun.

    Attributes:
        future: the results [N, ...] in order, of the key's dtype and on the CPU, or the first item's error.
            It cannot be cancelled by itself: `Engine.cancel` takes a job back.
    """

    def __init__(self, key: BatchKey, inputs: Sequence[Tensor], deadline_s: float) -> None:
        self.key = key
        self.deadline_s = deadline_s
        self.times = JobTimes()
        self.future: Future[Tensor] = Future()
        self.future.set_running_or_notify_cancel()
        self.tickets = [Ticket(self, index, tensor) for index, tensor in enumerate(inputs)]
        self._num_items = len(self.tickets)
        self._results: dict[int, Tensor] = {}
        self._lock = threading.Lock()

    def __len__(self) -> int:
        return self._num_items

    @property
    def settled(self) -> bool:
        """Whether the results, or an error, are there; further ones are ignored."""
        return self.future.done()

    def deliver(self, index: int, result: Tensor) -> None:
        """Note the result of one item; the last one settles the job."""
        with self._lock:
            if self.future.done():
                return
            self._results[index] = result
            if len(self._results) < len(self):
                return
            ordered = [self._results[i] for i in range(len(self))]
            self._results.clear()
            self.future.set_result(ordered[0][None] if len(ordered) == 1 else collate(ordered))

    def fail(self, error: Exception) -> bool:
        """Settle the job with an error; False if it was settled already."""
        with self._lock:
            if self.future.done():
                return False
            self._results.clear()
            self.future.set_exception(error)
            return True

    def release(self) -> None:
        """Let go of the items that no device has, once the outcome was taken.

        They and the job hold each other: until the garbage collector came by, they would outlive the request.
        """
        with self._lock:
            self.tickets.clear()


@dataclass(frozen=True, eq=False)
class Ticket:
    """One item in the queue."""

    job: Job
    index: int
    tensor: Tensor


class FairQueue:
    """A lane for each operation, each first in, first out; lanes share the device's time equally.

    The next batch comes from the waiting lane that has used least of the device's time, so that an
    operation which floods the queue delays the others by one batch at most (start-time fair queueing: a
    lane that was idle starts level with the one served last, and cannot save up).

    The queue does not bound its length: jobs are admitted before they are put.
    """

    def __init__(self) -> None:
        self._lanes: dict[Operation, dict[Ticket, None]] = {operation: {} for operation in OPERATIONS}
        self._used_s = dict.fromkeys(OPERATIONS, 0.0)
        self._served_s = 0.0
        self._changed = threading.Condition()
        self._closed = False
        self.num_engines = 1
        """How many take from it."""

    def __len__(self) -> int:
        return sum(len(lane) for lane in self._lanes.values())

    def put(self, job: Job) -> None:
        """Add a job's items."""
        operation = job.key.operation
        with self._changed:
            lane = self._lanes[operation]
            if not lane:
                self._used_s[operation] = max(self._used_s[operation], self._served_s)
            lane.update(dict.fromkeys(job.tickets))
            self._changed.notify()

    def take(self, max_items: int) -> list[Ticket]:
        """Wait for work, then remove and return up to ``max_items`` tickets that can run together.

        Other engines are left their share, also those at work: they end before a batch of all that waits
        would, so nothing waits longer than it must. Batches are full where more waits than all can take.

        Returns:
            At least one ticket, or none at all once the queue is closed and empty.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self) > 0)
            return self._take(min(max_items, math.ceil(len(self) / self.num_engines)))

    def take_full(self, max_items: int) -> list[Ticket]:
        """As `take`, without waiting: ``max_items`` tickets where the next batch has so many, else none."""
        with self._changed:
            operation = self._next_lane()
            if operation is None or len(self._lanes[operation]) < max_items:
                return []
            key = next(iter(self._lanes[operation])).job.key
            matching = sum(ticket.job.key == key for ticket in self._lanes[operation])
            return self._take(max_items) if matching >= max_items else []

    def charge(self, operation: Operation, duration_s: float) -> None:
        """Note the device's time for a batch of an operation, seconds."""
        with self._changed:
            self._used_s[operation] += duration_s

    def remove(self, job: Job) -> int:
        """Take a job's waiting items back; gives how many there were."""
        lane = self._lanes[job.key.operation]
        with self._changed:
            waiting = [ticket for ticket in job.tickets if ticket in lane]
            for ticket in waiting:
                del lane[ticket]
            return len(waiting)

    def close(self) -> None:
        """Let `take` return without work once the queue is empty."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _next_lane(self) -> Operation | None:
        waiting = [operation for operation, lane in self._lanes.items() if lane]
        return min(waiting, key=self._used_s.__getitem__, default=None)

    def _take(self, max_items: int) -> list[Ticket]:
        operation = self._next_lane()
        if operation is None:
            return []
        self._served_s = self._used_s[operation]
        lane = self._lanes[operation]
        key = next(iter(lane)).job.key
        batch: list[Ticket] = []
        for ticket in lane:
            if ticket.job.key == key:
                batch.append(ticket)
                if len(batch) == max_items:
                    break
        for ticket in batch:
            del lane[ticket]
        if len(self) > 0:
            self._changed.notify()
        return batch
