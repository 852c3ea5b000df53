"""The queue: order, grouping, bounds."""

import threading

import pytest
import torch

from service.batching import BatchKey, BatchQueue, Item, Operation, Ticket
from service.errors import QueueFullError

ENCODE = BatchKey(Operation.ENCODE)
BASE = BatchKey(Operation.ENCODE, latent="base")
DECODE = BatchKey(Operation.DECODE)


def tickets(*keys: BatchKey) -> list[Ticket]:
    return [Ticket(Item(key, torch.zeros(1)), deadline_s=float("inf")) for key in keys]


def test_take_groups_equal_keys_and_keeps_the_order_of_the_rest() -> None:
    queue = BatchQueue(10, 1)
    first = tickets(ENCODE, DECODE, ENCODE, BASE, DECODE, ENCODE)
    queue.put(first)
    assert queue.take(2) == [first[0], first[2]]
    assert queue.take(8) == [first[1], first[4]]
    assert queue.take(8) == [first[3]]
    assert queue.take(8) == [first[5]]
    assert len(queue) == 0


def test_put_is_all_or_nothing() -> None:
    queue = BatchQueue(3, retry_after_s=7)
    queue.put(tickets(ENCODE, ENCODE))
    with pytest.raises(QueueFullError, match="2 of at most 3") as caught:
        queue.put(tickets(ENCODE, ENCODE))
    assert caught.value.headers == {"Retry-After": "7"}
    assert len(queue) == 2
    queue.put(tickets(ENCODE))


def test_closed_queue_gives_what_is_left_then_nothing() -> None:
    queue = BatchQueue(3, 1)
    queue.put(tickets(ENCODE))
    queue.close()
    assert len(queue.take(8)) == 1
    assert queue.take(8) == []


def test_take_waits_for_work() -> None:
    queue = BatchQueue(3, 1)
    taken: list[Ticket] = []
    taker = threading.Thread(target=lambda: taken.extend(queue.take(8)))
    taker.start()
    one = tickets(ENCODE)
    queue.put(one)
    taker.join(10)
    assert taken == one


def test_clear_empties() -> None:
    queue = BatchQueue(3, 1)
    some = tickets(ENCODE, DECODE)
    queue.put(some)
    assert queue.clear() == some
    assert len(queue) == 0
