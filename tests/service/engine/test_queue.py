"""Jobs and the queue: order, grouping, fairness, what is taken back."""

import threading

import pytest
import torch

from service.engine import operations
from service.engine.operations import BatchKey
from service.engine.queue import FairQueue, Job, Ticket
from service.errors import LatentsError

ENCODE = BatchKey(operations.ENCODE)
BASE = BatchKey(operations.ENCODE, latent="base")
DECODE = BatchKey(operations.DECODE)


def job(key: BatchKey, num_items: int = 1) -> Job:
    return Job(key, list(torch.arange(float(num_items))), deadline_s=float("inf"))


def filled(*jobs: Job) -> FairQueue:
    queue = FairQueue()
    for each in jobs:
        queue.put(each)
    return queue


def jobs_of(batch: list[Ticket]) -> list[Job]:
    return [ticket.job for ticket in batch]


def test_results_come_in_order_whatever_order_they_were_made_in() -> None:
    one = job(ENCODE, 3)
    for index in (2, 0, 1):
        assert not one.settled
        one.deliver(index, torch.tensor([10.0 * index]))
    assert one.future.result(0).tolist() == [[0.0], [10.0], [20.0]]


def test_the_first_error_settles_a_job() -> None:
    one = job(ENCODE, 2)
    one.deliver(0, torch.zeros(1))
    assert one.fail(LatentsError("first"))
    assert not one.fail(LatentsError("second"))
    one.deliver(1, torch.zeros(1))
    with pytest.raises(LatentsError, match="first"):
        one.future.result(0)


def test_take_groups_equal_keys_and_keeps_the_order_of_the_rest() -> None:
    first, base, second = job(ENCODE, 2), job(BASE), job(ENCODE, 2)
    queue = filled(first, base, second)
    assert jobs_of(queue.take(3)) == [first, first, second]
    assert jobs_of(queue.take(8)) == [base]
    assert jobs_of(queue.take(8)) == [second]
    assert len(queue) == 0


def test_a_flood_of_one_operation_delays_another_by_one_batch() -> None:
    flood, rare = job(ENCODE, 100), job(DECODE)
    queue = filled(flood)
    queue.take(8)
    queue.put(rare)
    queue.charge(operations.ENCODE, 1.0)
    assert jobs_of(queue.take(8)) == [rare]


def test_operations_share_the_time_and_not_the_batches() -> None:
    queue = filled(job(ENCODE, 1000), job(DECODE, 1000))
    cost_s = {operations.ENCODE: 1.0, operations.DECODE: 3.0}
    used_s = dict.fromkeys(cost_s, 0.0)
    for _ in range(80):
        operation = queue.take(8)[0].job.key.operation
        queue.charge(operation, cost_s[operation])
        used_s[operation] += cost_s[operation]
    assert abs(used_s[operations.ENCODE] - used_s[operations.DECODE]) <= 3.0


def test_an_idle_operation_saves_nothing_up() -> None:
    queue = filled(job(ENCODE, 1000))
    for _ in range(50):
        queue.take(8)
        queue.charge(operations.ENCODE, 1.0)
    queue.put(job(DECODE, 1000))
    served = []
    for _ in range(10):
        operation = queue.take(8)[0].job.key.operation
        queue.charge(operation, 1.0)
        served.append(operation)
    assert 4 <= served.count(operations.DECODE) <= 6


def test_what_is_removed_is_never_taken() -> None:
    gone, kept = job(ENCODE, 3), job(ENCODE)
    queue = filled(gone, kept)
    taken = queue.take(1)
    assert jobs_of(taken) == [gone]
    assert queue.remove(gone) == 2
    assert queue.remove(gone) == 0
    assert jobs_of(queue.take(8)) == [kept]


def test_take_full_never_waits_nor_takes_less() -> None:
    queue = FairQueue()
    assert queue.take_full(2) == []
    queue.put(job(ENCODE))
    queue.put(job(BASE))
    assert queue.take_full(2) == [], "two items wait, and cannot share a batch"
    queue.put(job(ENCODE))
    assert len(queue.take_full(2)) == 2
    assert len(queue) == 1


def test_engines_are_left_their_share() -> None:
    queue = filled(job(ENCODE, 5))
    queue.num_engines = 2
    assert [len(queue.take(8)) for _ in range(3)] == [3, 1, 1]
    queue.put(job(ENCODE, 40))
    assert len(queue.take(8)) == 8, "more waits than all can take"


def test_closed_queue_gives_what_is_left_then_nothing() -> None:
    queue = filled(job(ENCODE))
    queue.close()
    assert len(queue.take(8)) == 1
    assert queue.take(8) == []


def test_take_waits_for_work() -> None:
    queue = FairQueue()
    taken: list[Ticket] = []
    taker = threading.Thread(target=lambda: taken.extend(queue.take(8)))
    taker.start()
    one = job(ENCODE)
    queue.put(one)
    taker.join(10)
    assert jobs_of(taken) == [one]
