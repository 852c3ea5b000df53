"""The worker's accounts: what a batch costs, and who is charged for one that fails."""

from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from service.engine import operations, worker
from service.engine.operations import OPERATIONS, BatchKey, Operation
from service.engine.queue import FairQueue, Job
from service.engine.rates import Rates
from service.engine.runners import Outcome
from service.engine.worker import Worker
from service.telemetry.metrics import Metrics

ENCODE = BatchKey(operations.ENCODE)
DECODE = BatchKey(operations.DECODE)
POISON = 9.0
ITEM_S, FAILURE_S = 0.01, 2.0


class Clocked:
    """A runner on a clock of its own: an item takes 10 ms, a poisoned one 2 s before its batch fails."""

    name = "cpu:0"
    buckets = (1, 2)
    depth = 1

    def __init__(self) -> None:
        self.now_s = 1000.0

    def warm(self) -> Mapping[Operation, float]:
        return dict.fromkeys(OPERATIONS, ITEM_S * self.buckets[-1])

    def launch(self, key: BatchKey, inputs: Sequence[Tensor]) -> Any:
        started_s = self.now_s
        if any(float(item) == POISON for item in inputs):
            self.now_s += FAILURE_S
            raise RuntimeError("a poisoned item")
        self.now_s += ITEM_S * len(inputs)
        outcome = Outcome(
            torch.stack(list(inputs)), *[[True] * len(inputs)] * 2, started_s, self.now_s - started_s
        )
        return SimpleNamespace(wait=lambda: outcome)

    def free_memory(self) -> None:
        pass


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> Clocked:
    clocked = Clocked()
    monkeypatch.setattr(worker, "time", SimpleNamespace(monotonic=lambda: clocked.now_s))
    return clocked


def work_off(
    runner: Clocked, requests: Sequence[tuple[BatchKey, Sequence[float]]]
) -> tuple[Rates, FairQueue]:
    """Rates and queue after a worker had these requests, all at once."""
    queue, rates = FairQueue(), Rates()
    jobs = [Job(key, [torch.tensor(value) for value in values], float("inf")) for key, values in requests]
    for job in jobs:
        queue.put(job)
    queue.close()
    thread = Worker(runner, queue, lambda: None, rates, Metrics())
    thread.start()
    thread.join(60)
    assert thread.failure is None
    assert all(job.settled for job in jobs)
    return rates, queue


@pytest.mark.parametrize("poisoned", [[POISON], [0.0, POISON]], ids=["alone", "in a batch"])
def test_the_time_of_a_failed_batch_is_no_part_of_the_next_ones(
    runner: Clocked, poisoned: list[float]
) -> None:
    rates, _ = work_off(runner, [(ENCODE, [0.0]), (ENCODE, poisoned), (ENCODE, [0.0])])
    assert rates.duration_s({operations.ENCODE: 1}, 1) == pytest.approx(ITEM_S)


def test_the_time_of_a_failed_batch_is_charged_to_its_operation(runner: Clocked) -> None:
    """Those who send what fails do not take the device from the others."""
    _, queue = work_off(runner, [(ENCODE, [POISON]), (DECODE, [0.0])])
    assert queue._used_s[operations.ENCODE] == pytest.approx(FAILURE_S)
    assert queue._used_s[operations.DECODE] == pytest.approx(ITEM_S)


def test_a_batch_costs_at_least_the_devices_time(runner: Clocked) -> None:
    """Also where a failure during it began the accounts anew."""
    launch = runner.launch

    def launch_after_failure(key: BatchKey, inputs: Sequence[Tensor]) -> Any:
        launched = launch(key, inputs)
        thread = worker.threading.current_thread()
        thread._account_from_now()  # type: ignore[attr-defined]
        return launched

    runner.launch = launch_after_failure  # type: ignore[method-assign]
    rates, _ = work_off(runner, [(ENCODE, [0.0, 1.0])])
    assert rates.duration_s({operations.ENCODE: 1}, 1) == pytest.approx(ITEM_S)
