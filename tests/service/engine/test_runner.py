"""The GPU's runner on a stubbed device: failures beside a batch in flight, and results that stay apart."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor

from service.engine import operations
from service.engine.cuda import CudaRunner
from service.engine.operations import BatchKey
from service.engine.queue import FairQueue, Job
from service.engine.rates import Rates
from service.engine.worker import Worker
from service.errors import DeviceMemoryError
from service.telemetry.metrics import Metrics

DECODE = BatchKey(operations.DECODE)
OUT_OF_MEMORY = torch.OutOfMemoryError("CUDA out of memory")


class Faults:
    """Which launches and which waits fail, by number from 0, and items that fail always."""

    def __init__(self) -> None:
        self.launches: dict[int, Exception] = {}
        self.waits: dict[int, Exception] = {}
        self.guilty: set[float] = set()
        self.failed_launches: list[int] = []
        self.num_launches = 0
        self.num_waits = 0

    def launch(self, values: list[float]) -> None:
        number, self.num_launches = self.num_launches, self.num_launches + 1
        if self.guilty & set(values):
            self.failed_launches.append(number)
            raise OUT_OF_MEMORY
        if error := self.launches.get(number):
            raise error

    def wait(self) -> None:
        number, self.num_waits = self.num_waits, self.num_waits + 1
        if error := self.waits.get(number):
            raise error


class Device:
    """Does what is queued on it only once somebody waits: memory that was reused by then holds another's.

    Attributes:
        in_flight: batches whose end has not been waited for.
        overlaps: for each launch, how many were in flight.
    """

    def __init__(self) -> None:
        self._queued: list[Callable[[], Any]] = []
        self.faults = Faults()
        self.in_flight = 0
        self.overlaps: list[int] = []
        self.launched: list[list[float]] = []
        """Values of the batch that is being launched; the device has not read them yet."""

    def queue(self, work: Callable[[], Any]) -> int:
        """Queue work; its place, for `run_until`."""
        self._queued.append(work)
        return len(self._queued)

    @torch.inference_mode()
    def run_until(self, place: int) -> None:
        for index in range(place):
            work, self._queued[index] = self._queued[index], lambda: None
            work()

    @property
    def end(self) -> int:
        return len(self._queued)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    """`torch.cuda` on the CPU, all of its streams one queue that is lazy."""
    lazy = Device()

    class Stream:
        def wait_stream(self, other: "Stream") -> None:
            pass

    class Event:
        def __init__(self, enable_timing: bool = True, blocking: bool = False) -> None:
            self._ends_batch = not enable_timing
            self._place = 0

        def record(self) -> None:
            self._place = lazy.end

        def synchronize(self) -> None:
            if self._ends_batch:
                lazy.in_flight -= 1
                lazy.faults.wait()
            lazy.run_until(self._place)

        def elapsed_time(self, other: "Event") -> float:
            return 1.0

    copy, empty, empty_like = torch.Tensor.copy_, torch.empty, torch.empty_like

    def copy_lazily(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if non_blocking:
            lazy.queue(lambda: copy(target, source))
            return target
        return copy(target, source)

    def clone_lazily(tensor: Tensor) -> Tensor:
        return copy_lazily(empty_like(tensor), tensor, non_blocking=True)

    def without_pinning(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        return lambda *args, pin_memory=False, **kwargs: function(*args, **kwargs)

    for name, stub in {"Stream": Stream, "Event": Event, "empty_cache": lambda: None}.items():
        monkeypatch.setattr(torch.cuda, name, stub)
    for name in ("device", "stream"):
        monkeypatch.setattr(torch.cuda, name, lambda _: nullcontext())
    monkeypatch.setattr(torch.Tensor, "copy_", copy_lazily)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "clone", clone_lazily)
    monkeypatch.setattr(torch, "empty", without_pinning(empty))
    monkeypatch.setattr(torch, "empty_like", without_pinning(empty_like))
    return lazy


class Config:
    latent_shape = (1, 1, 1)
    image_size = 4


class Fake:
    """What `CudaRunner` asks of a tokenizer, except to run."""

    device = torch.device("cpu")
    dtype = torch.float32
    config = Config
    has_statistics = False


class Graph:
    """A model that gives each item back, once the device comes to it, in memory that replays overwrite."""

    def __init__(self, device: Device, num_items: int) -> None:
        self._device = device
        self._inputs = torch.zeros(num_items, 1, 1, 1)
        self._results = torch.zeros(num_items, 1, 1, 1)
        self._largest = torch.full((num_items,), torch.nan)

    def inputs(self, num_items: int) -> Tensor:
        return self._inputs[:num_items]

    def _run(self, num_items: int) -> None:
        for index in range(num_items):
            self._results[index] = self._inputs[index]
            self._largest[index] = float(self._inputs[index])

    def replay(self, num_items: int) -> tuple[Tensor, ...]:
        self._device.overlaps.append(self._device.in_flight)
        self._device.faults.launch(self._device.launched.pop())
        self._device.queue(lambda: self._run(num_items))
        self._device.in_flight += 1
        return self._results[:num_items], self._largest[:num_items]


def make_runner(device: Device, buckets: tuple[int, ...]) -> CudaRunner:
    """A runner on a stubbed device."""
    runner = CudaRunner(Fake(), buckets)  # type: ignore[arg-type]
    runner._captured = {operations.DECODE.usual: Graph(device, buckets[-1])}  # type: ignore[dict-item]
    launch = runner.launch

    def noting_launch(key: BatchKey, inputs: list[Tensor]) -> Any:
        device.launched.append([float(tensor) for tensor in inputs])
        return launch(key, inputs)

    runner.launch = noting_launch  # type: ignore[method-assign, assignment]
    return runner


@contextmanager
def worked_off(runner: CudaRunner, requests: list[list[float]]) -> Iterator[list[Job]]:
    """Jobs of these values, after a worker has had them all at once."""
    queue = FairQueue()
    worker = Worker(runner, queue, lambda: None, Rates(), Metrics())
    worker._warm = worker.warmed.set  # type: ignore[method-assign]
    jobs = [
        Job(DECODE, [torch.full((1, 1, 1), value) for value in values], time.monotonic() + 600)
        for values in requests
    ]
    for job in jobs:
        queue.put(job)
    queue.close()
    worker.start()
    worker.join(60)
    assert not worker.is_alive()
    assert worker.failure is None
    yield jobs


def outcome(job: Job) -> list[float] | type[BaseException]:
    error = job.future.exception(0)
    return job.future.result().flatten().tolist() if error is None else type(error)


REQUESTS = [[11.0, 12.0], [21.0, 22.0], [31.0, 32.0], [41.0, 42.0]]
SINGLES = [[value] for values in REQUESTS for value in values]
BATCHES = pytest.mark.parametrize(
    ("buckets", "requests"), [((1, 2), REQUESTS), ((1,), SINGLES)], ids=["pairs", "ones"]
)


@pytest.mark.parametrize("kind", ["launches", "waits"])
@pytest.mark.parametrize("error", [OUT_OF_MEMORY, RuntimeError("kernel failed")], ids=["memory", "error"])
@pytest.mark.parametrize("at", [(0,), (1,), (2,), (0, 1), (1, 2), (1, 2, 3), (0, 2, 4)])
@pytest.mark.parametrize(
    ("buckets", "requests"), [((1, 2), REQUESTS), ((1,), SINGLES)], ids=["pairs", "ones"]
)
def test_a_failure_beside_a_batch_in_flight_gives_nobody_anothers_result(
    device: Device, kind: str, error: Exception, at: tuple[int, ...], buckets: Any, requests: Any
) -> None:
    getattr(device.faults, kind).update(dict.fromkeys(at, error))
    runner = make_runner(device, buckets)
    with worked_off(runner, requests) as jobs:
        given = [outcome(job) for job in jobs]
    wrong = [pair for pair in zip(requests, given, strict=True) if pair[0] != pair[1]]
    assert all(isinstance(error, type) for _, error in wrong), wrong
    assert len(wrong) <= len(at), "a fault fails one request at most"


def test_two_batches_are_in_flight_where_nothing_fails(device: Device) -> None:
    with worked_off(make_runner(device, (1, 2)), REQUESTS) as jobs:
        assert [outcome(job) for job in jobs] == REQUESTS
    assert max(device.overlaps) == 1


@pytest.mark.parametrize("buckets", [(1, 2), (1,)])
def test_what_failed_only_beside_another_batch_succeeds_alone(device: Device, buckets: Any) -> None:
    device.faults.launches = {1: OUT_OF_MEMORY}
    requests = [[11.0] * buckets[-1], [21.0] * buckets[-1]]
    with worked_off(make_runner(device, buckets), requests) as jobs:
        assert [outcome(job) for job in jobs] == requests
    assert device.overlaps == [0, 1, 0]


@pytest.mark.parametrize(
    ("buckets", "requests"), [((1, 2), REQUESTS), ((1,), SINGLES)], ids=["pairs", "ones"]
)
def test_recovery_never_overlaps_a_batch_and_finds_the_guilty(
    device: Device, buckets: Any, requests: Any
) -> None:
    device.faults.guilty = {22.0}
    with worked_off(make_runner(device, buckets), requests) as jobs:
        for values, job in zip(requests, jobs, strict=True):
            assert outcome(job) == (DeviceMemoryError if 22.0 in values else values)
    failed = device.faults.failed_launches[0]
    num_retries = 2 * buckets[-1] - 1  # whole, then its halves
    assert device.overlaps[failed + 1 : failed + 1 + num_retries] == [0] * num_retries


class Pictures:
    """A graph of pictures, as the runner captures it: floats, the same as bytes, and their magnitudes."""

    def __init__(self) -> None:
        self.read = torch.full((2, 3, 4, 4), -1.0)
        floats = torch.rand(2, 3, 4, 4)
        self.results = floats, operations.finished(floats, torch.uint8), torch.tensor([1e5, torch.inf])

    def inputs(self, num_items: int) -> Tensor:
        return self.read[:num_items]

    def replay(self, num_items: int) -> tuple[Tensor, ...]:
        return tuple(tensor[:num_items] for tensor in self.results)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float16])
@pytest.mark.parametrize("num_items", [1, 2])
def test_results_come_in_the_type_of_the_answer_and_are_not_copied_again(
    device: Device, dtype: torch.dtype, num_items: int
) -> None:
    runner, graph = make_runner(device, (1, 2)), Pictures()
    runner._captured = {operations.RECONSTRUCT.usual: graph}  # type: ignore[dict-item]
    interleaved = torch.randint(0, 256, (num_items, 4, 4, 3), dtype=torch.uint8).movedim(-1, 1)
    launched = CudaRunner.launch(
        runner, BatchKey(operations.RECONSTRUCT, dtype=dtype), list(interleaved.unbind())
    )
    outcome = launched.wait()
    assert outcome.results is launched.results
    assert outcome.finite == [True, False][:num_items]
    assert outcome.fits == [dtype != torch.float16, False][:num_items]
    assert outcome.results.dtype == dtype
    assert torch.equal(outcome.results, operations.finished(graph.results[0][:num_items], dtype))
    is_interleaved = outcome.results.is_contiguous(memory_format=torch.channels_last)
    assert is_interleaved == (dtype == torch.uint8)
    assert torch.equal(graph.read[:num_items], interleaved.float() / 255)


def test_a_batch_mixes_pictures_as_bytes_and_as_floats(device: Device) -> None:
    runner, graph = make_runner(device, (1, 2)), Pictures()
    runner._captured = {operations.RECONSTRUCT.usual: graph}  # type: ignore[dict-item]
    as_bytes = torch.randint(0, 256, (4, 4, 3), dtype=torch.uint8).movedim(-1, 0)
    CudaRunner.launch(runner, operations.RECONSTRUCT.usual, [as_bytes, torch.full((3, 4, 4), 0.25)]).wait()
    assert torch.equal(graph.read, torch.stack([as_bytes / 255, torch.full((3, 4, 4), 0.25)]))
