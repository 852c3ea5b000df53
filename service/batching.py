"""Items, and the bounded queue that groups compatible ones into batches.

Requests are split into items, one image or latent each, so that items of different requests can
share a batch. The queue is the only thing that request handlers and the model's thread share.
"""

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from enum import StrEnum

from torch import Tensor

from model.tokenizer import LatentKind
from service.errors import QueueFullError


class Operation(StrEnum):
    """What the model does with an item."""

    ENCODE = "encode"
    DECODE = "decode"
    RECONSTRUCT = "reconstruct"


@dataclass(frozen=True)
class BatchKey:
    """Items with equal keys can go through the model together.

    Attributes:
        operation: what is done.
        latent: which latent is made (encode, reconstruct).
        normalize: whether latents are, or come, normalised per position.
    """

    operation: Operation
    latent: LatentKind = "enriched"
    normalize: bool = False


@dataclass(frozen=True, eq=False)
class Item:
    """One unit of work: an image [3, S, S] in [0, 1], or a latent [C, h, w]; float32, on the CPU."""

    key: BatchKey
    tensor: Tensor


@dataclass(frozen=True, eq=False)
class Ticket:
    """An item in the queue, with its promise and its times (`time.monotonic`, seconds)."""

    item: Item
    deadline_s: float
    enqueued_s: float = field(default_factory=time.monotonic)
    future: Future[Tensor] = field(default_factory=Future)


class BatchQueue:
    """First in, first out, bounded in items; `take` gives the oldest item and all that can join it.

    Args:
        limit_items: most items that wait.
        retry_after_s: what a refused client is told, seconds.
    """

    def __init__(self, limit_items: int, retry_after_s: int) -> None:
        self._limit_items = limit_items
        self._retry_after_s = retry_after_s
        self._tickets: deque[Ticket] = deque()
        self._changed = threading.Condition()
        self._closed = False

    def __len__(self) -> int:
        return len(self._tickets)

    def check_room(self, num_items: int) -> None:
        """Refuse early what `put` would refuse now.

        Raises:
            QueueFullError: there is no room for ``num_items``.
        """
        if len(self._tickets) + num_items > self._limit_items:
            raise QueueFullError(
                f"The queue is full: {len(self._tickets)} of at most {self._limit_items} items wait, "
                f"and {num_items} more came.",
                {"Retry-After": str(self._retry_after_s)},
            )

    def put(self, tickets: Sequence[Ticket]) -> None:
        """Add all tickets or none.

        Raises:
            QueueFullError: they do not fit.
        """
        with self._changed:
            self.check_room(len(tickets))
            self._tickets.extend(tickets)
            self._changed.notify()

    def take(self, max_items: int) -> list[Ticket]:
        """Wait for work, then remove and return up to ``max_items`` tickets of the oldest one's key.

        Returns:
            At least one ticket, or none at all once the queue is closed and empty.
        """
        with self._changed:
            self._changed.wait_for(lambda: self._tickets or self._closed)
            if not self._tickets:
                return []
            key = self._tickets[0].item.key
            batch: list[Ticket] = []
            others: deque[Ticket] = deque()
            for ticket in self._tickets:
                joins = len(batch) < max_items and ticket.item.key == key
                (batch if joins else others).append(ticket)
            self._tickets = others
            return batch

    def close(self) -> None:
        """Let `take` return without work once the queue is empty."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def clear(self) -> list[Ticket]:
        """Remove and return everything that waits."""
        with self._changed:
            tickets, self._tickets = list(self._tickets), deque()
            return tickets
