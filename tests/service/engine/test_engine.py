"""The engine: jobs, batching, deadlines, failures of items, of devices and of threads, the end."""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from model.errors import CheckpointError, FusionError, LatentError
from model.tokenizer import Tokenizer
from service.engine import operations
from service.engine.devices import CpuShares, load_tokenizer, share_cpus, visible_devices
from service.engine.engine import Engine
from service.engine.operations import BatchKey
from service.engine.queue import Job
from service.engine.state import EngineState
from service.errors import (
    DeadlineError,
    DeviceMemoryError,
    InternalError,
    LatentsError,
    ServiceError,
    UnavailableError,
)
from service.settings import Settings
from service.telemetry.metrics import Metrics

FAR_S = float("inf")
ENCODE = BatchKey(operations.ENCODE)
DECODE = BatchKey(operations.DECODE)
RECONSTRUCT = BatchKey(operations.RECONSTRUCT)
TOLERANCE = 1e-5  # of float32, between one batch size and another


@contextmanager
def running(tokenizer: Any, **settings: Any) -> Iterator[Engine]:
    engine = Engine(Settings(**{"cpu_workers": 1, **settings}), Metrics(), load=lambda _: tokenizer)
    engine.start()
    assert engine.wait_until_settled(30)
    assert engine.state is EngineState.READY, engine.failure
    getattr(tokenizer, "arm", lambda: None)()
    try:
        yield engine
    finally:
        getattr(tokenizer, "gate", threading.Event()).set()
        engine.close(30)


def images(num_items: int, side: int = 64) -> list[Tensor]:
    return list(torch.rand((num_items, 3, side, side), generator=torch.Generator().manual_seed(3)))


def submit(engine: Engine, key: BatchKey, inputs: list[Tensor], deadline_s: float = FAR_S) -> Job:
    job = Job(key, inputs, deadline_s)
    engine.submit(job)
    return job


def sample(engine: Engine, name: str, **labels: str) -> float | None:
    return engine._metrics.registry.get_sample_value(name, labels)


def test_results_are_the_tokenizers(tokenizer: Tokenizer) -> None:
    inputs = images(3)
    with running(tokenizer, batch_size=4) as engine:
        for key in (ENCODE, BatchKey(operations.ENCODE, "base"), BatchKey(operations.ENCODE, normalize=True)):
            expected = tokenizer.encode(torch.stack(inputs), latent=key.latent, normalize=key.normalize)
            torch.testing.assert_close(submit(engine, key, inputs).future.result(30), expected)
        latents = tokenizer.encode(torch.stack(inputs))
        decoded = submit(engine, DECODE, list(latents)).future.result(30)
        torch.testing.assert_close(decoded, tokenizer.decode(latents))
        torch.testing.assert_close(submit(engine, RECONSTRUCT, inputs).future.result(30), decoded)
        assert sample(engine, "drorae_items_total", operation="encode", outcome="ok") == 9


def test_bytes_and_floats_share_a_batch(tokenizer: Tokenizer, gated: Any) -> None:
    exact = [image.mul(255).round() / 255 for image in images(2)]
    as_bytes = exact[0].mul(255).round().to(torch.uint8)
    with running(gated) as engine:
        busy = submit(engine, ENCODE, images(1))
        assert gated.entered.acquire(timeout=30)
        job = submit(engine, ENCODE, [as_bytes, exact[1]])
        gated.gate.set()
        busy.future.result(30)
        expected = tokenizer.encode(torch.stack(exact))
        torch.testing.assert_close(job.future.result(30), expected, atol=TOLERANCE, rtol=0)
        assert gated.batch_sizes == [1, 2]


@pytest.mark.parametrize("operation", operations.OPERATIONS)
@pytest.mark.parametrize("num_items", [1, 2, 3, 5, 8])
def test_a_result_does_not_depend_on_its_batch(
    tokenizer: Tokenizer, operation: operations.Operation, num_items: int
) -> None:
    inputs = images(num_items)
    if operation is operations.DECODE:
        inputs = list(tokenizer.encode(torch.stack(inputs)))
    with running(tokenizer) as engine:
        together = submit(engine, BatchKey(operation), inputs).future.result(30)
        alone = [submit(engine, BatchKey(operation), [each]).future.result(30) for each in inputs]
    torch.testing.assert_close(together, torch.cat(alone), atol=TOLERANCE, rtol=0)


def test_waiting_items_share_batches_that_are_padded_to_their_bucket(gated: Any) -> None:
    with running(gated, batch_size=4, batch_buckets=(1, 4)) as engine:
        first = submit(engine, ENCODE, images(1))
        assert gated.entered.acquire(timeout=30)
        others = [submit(engine, ENCODE, images(3)) for _ in range(2)]
        gated.gate.set()
        for job in (first, *others):
            assert torch.isfinite(job.future.result(30)).all()
        assert gated.batch_sizes == [1, 4, 4]
        assert sample(engine, "drorae_batch_items_sum", operation="encode") == 7
        assert sample(engine, "drorae_batch_padding_items_sum", operation="encode") == 2


def test_workers_run_side_by_side(gated: Any) -> None:
    with running(gated, cpu_workers=2) as engine:
        jobs = [submit(engine, ENCODE, images(1)) for _ in range(2)]
        for _ in jobs:
            assert gated.entered.acquire(timeout=30)
        gated.gate.set()
        for job in jobs:
            job.future.result(30)
        busy_s = engine._metrics.device_busy_seconds
        assert all(busy_s.labels(f"cpu:{index}")._value.get() > 0 for index in (0, 1))


def test_expired_and_cancelled_items_never_reach_the_device(gated: Any) -> None:
    with running(gated) as engine:
        first = submit(engine, ENCODE, images(1))
        assert gated.entered.acquire(timeout=30)
        expired = submit(engine, ENCODE, images(1), time.monotonic() - 1)
        cancelled = submit(engine, ENCODE, images(2))
        good = submit(engine, ENCODE, images(1))
        engine.cancel(cancelled, DeadlineError("gone"))
        gated.gate.set()
        first.future.result(30)
        good.future.result(30)
        for job in (expired, cancelled):
            with pytest.raises(DeadlineError):
                job.future.result(30)
        assert gated.batch_sizes == [1, 1]
        assert sample(engine, "drorae_items_total", operation="encode", outcome="expired") == 1
        assert sample(engine, "drorae_items_total", operation="encode", outcome="cancelled") == 2


class Fussy:
    """A tokenizer that fails on batches that hold a marked item, or that are too large."""

    def __init__(self, tokenizer: Tokenizer, error: Exception, max_items: int = 1000) -> None:
        self._tokenizer = tokenizer
        self._error = error
        self._max_items = max_items
        self.num_batches = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, batch: Tensor, **options: Any) -> Tensor:
        self.num_batches += 1
        if len(batch) > self._max_items or (batch.flatten(1).amin(dim=1) < 0).any():
            raise self._error
        return self._tokenizer.encode(batch, **options)


@pytest.mark.parametrize(
    ("error", "seen", "reason"),
    [
        (RuntimeError("kernel failed"), InternalError, "error"),
        (LatentError("no"), LatentsError, "refused"),
        (torch.OutOfMemoryError("CUDA out of memory"), DeviceMemoryError, "out-of-memory"),
        (MemoryError(), DeviceMemoryError, "out-of-memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), DeviceMemoryError, "out-of-memory"),
    ],
)
def test_a_failing_item_fails_alone(
    tokenizer: Tokenizer, gated: Any, error: Exception, seen: type[ServiceError], reason: str
) -> None:
    inputs = images(8)
    inputs[5] = inputs[5] - 5
    gated._tokenizer = Fussy(tokenizer, error)
    with running(gated) as engine:
        first = submit(engine, ENCODE, images(1))
        assert gated.entered.acquire(timeout=30)
        jobs = [submit(engine, ENCODE, [each]) for each in inputs]
        gated.gate.set()
        first.future.result(30)
        for index, job in enumerate(jobs):
            if index == 5:
                with pytest.raises(seen):
                    job.future.result(30)
            else:
                assert torch.isfinite(job.future.result(30)).all()
        assert sample(engine, "drorae_batch_failures_total", reason=reason) == 3
        submit(engine, ENCODE, images(1)).future.result(30)
        assert engine.state is EngineState.READY


def test_a_request_with_a_guilty_item_says_which(tokenizer: Tokenizer) -> None:
    inputs = images(3)
    inputs[1] = inputs[1] - 5
    with (
        running(Fussy(tokenizer, LatentError("bad"))) as engine,
        pytest.raises(LatentsError, match="Item 1: Bad"),
    ):
        submit(engine, ENCODE, inputs).future.result(30)


def test_batches_too_large_for_the_memory_are_halved(tokenizer: Tokenizer, gated: Any) -> None:
    with running(gated) as engine:
        gated._tokenizer = Fussy(tokenizer, torch.OutOfMemoryError("CUDA out of memory"), max_items=3)
        gated.gate.set()
        assert submit(engine, ENCODE, images(8)).future.result(30).shape == (8, 32, 8, 8)
        assert gated.batch_sizes == [8, 4, 2, 2, 4, 2, 2]


def test_overflow_is_an_error_and_not_a_nan(tokenizer: Tokenizer) -> None:
    with running(tokenizer) as engine:
        huge = submit(engine, DECODE, [torch.full((32, 8, 8), 3e38)])
        fine = submit(engine, DECODE, [torch.zeros((32, 8, 8))])
        with pytest.raises(LatentsError, match="overflow"):
            huge.future.result(30)
        assert torch.isfinite(fine.future.result(30)).all()


def broken_engine(tokenizer: Any, **settings: Any) -> tuple[Engine, threading.Event]:
    told = threading.Event()
    engine = Engine(
        Settings(cpu_workers=1, batch_size=1, **settings),
        Metrics(),
        load=lambda _: tokenizer,
        on_failure=told.set,
    )
    engine.start()
    assert engine.wait_until_settled(30)
    assert engine.state is EngineState.READY, engine.failure
    return engine, told


def test_a_hung_device_fails_everything_that_was_accepted(gated: Any) -> None:
    engine, told = broken_engine(gated, hang_timeout_s=0.5)
    gated.arm()
    jobs = [submit(engine, ENCODE, images(1)) for _ in range(3)]
    assert told.wait(10)
    assert engine.state is EngineState.FAILED
    assert engine.broken
    assert "busy with one batch for over" in str(engine.failure)
    for job in jobs:
        with pytest.raises(UnavailableError, match="engine has failed"):
            job.future.result(10)
    for call in (engine.check_ready, lambda: submit(engine, ENCODE, images(1))):
        with pytest.raises(UnavailableError, match="engine has failed"):
            call()
    started_s = time.monotonic()
    engine.close(30)
    assert time.monotonic() - started_s < 5, "it does not wait for what hangs"
    gated.gate.set()


class Dying:
    """A tokenizer that raises once it is told to."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.error: BaseException | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, batch: Tensor, **options: Any) -> Tensor:
        if self.error is not None:
            raise self.error
        return self._tokenizer.encode(batch, **options)

    reconstruct = encode


@pytest.mark.parametrize(
    ("error", "words"),
    [(SystemExit(), "SystemExit"), (RuntimeError("an illegal memory access"), "fails on known inputs")],
)
def test_a_dead_engine_fails_everything_that_was_accepted(
    tokenizer: Tokenizer, error: BaseException, words: str
) -> None:
    dying = Dying(tokenizer)
    engine, told = broken_engine(dying)
    dying.error = error
    jobs = [submit(engine, ENCODE, images(1)) for _ in range(2)]
    assert told.wait(10)
    assert words in str(engine.failure)
    for job in jobs:
        with pytest.raises(UnavailableError, match="engine has failed"):
            job.future.result(10)
    engine.close(30)


class Slow:
    """A tokenizer whose batches take their size in seconds, on a clock of their own."""

    def __init__(self, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, held_up_s: float = 0.0) -> None:
        self._tokenizer = tokenizer
        self._now_s = 0.0
        self._held_up_s = held_up_s
        self.batch_sizes: list[int] = []
        now = SimpleNamespace(monotonic=lambda: self._now_s)
        for module in ("cpu", "warming"):
            monkeypatch.setattr(f"service.engine.{module}.time", now)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def reconstruct(self, batch: Tensor, **options: Any) -> Tensor:
        self._now_s += len(batch)
        if len(batch) not in self.batch_sizes:
            self._now_s += self._held_up_s  # by others: the first time only
        self.batch_sizes.append(len(batch))
        return self._tokenizer.reconstruct(batch, **options)


def test_batch_sizes_that_are_too_slow_are_left_out(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    slow = Slow(tokenizer, monkeypatch)
    with running(slow, batch_size=8, hang_timeout_s=7) as engine:
        assert engine.batch_size == 3, "half of the limit, for what takes longer than when it was measured"
        assert set(slow.batch_sizes) == {1, 2, 3, 4}, "none larger is tried"
        slow.batch_sizes.clear()
        assert submit(engine, RECONSTRUCT, images(8)).future.result(30).shape == (8, 3, 64, 64)
        assert max(slow.batch_sizes) == 3
    assert [record.levelname for record in caplog.records if "hang_timeout_s=7" in record.message] == [
        "WARNING"
    ]


def test_one_slow_sample_is_no_measure(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    with running(Slow(tokenizer, monkeypatch, held_up_s=9), batch_size=3, hang_timeout_s=7) as engine:
        assert engine.batch_size == 3


@pytest.mark.parametrize("settings", [{"batch_size": 8}, {"batch_size": 1}, {"batch_buckets": (8,)}])
def test_the_smallest_batch_stays_and_gets_the_time_that_it_needs(
    tokenizer: Tokenizer, caplog: pytest.LogCaptureFixture, settings: dict[str, Any]
) -> None:
    with running(tokenizer, hang_timeout_s=1e-4, **settings) as engine:
        assert engine.batch_size == min(settings.get("batch_buckets", (1,)))
        submit(engine, ENCODE, images(3)).future.result(30)
    assert any("it may take" in record.message and "0.0001" in record.message for record in caplog.records)


def hanging_load(gate: threading.Event, tokenizer: Tokenizer) -> Callable[[Settings], Any]:
    def load(_: Settings) -> Tokenizer:
        gate.wait(60)
        return tokenizer

    return load


def hanging_warm_up(gate: threading.Event, tokenizer: Tokenizer) -> Callable[[Settings], Any]:
    class Hanging(Dying):
        def reconstruct(self, batch: Tensor, **options: Any) -> Tensor:
            gate.wait(60)
            return tokenizer.reconstruct(batch, **options)

    return lambda _: Hanging(tokenizer)


@pytest.mark.parametrize("hanging", [hanging_load, hanging_warm_up])
def test_a_device_that_hangs_at_the_start_breaks_the_engine(tokenizer: Tokenizer, hanging: Any) -> None:
    gate, told = threading.Event(), threading.Event()
    settings = Settings(cpu_workers=1, batch_size=1, start_timeout_s=0.5)
    engine = Engine(settings, Metrics(), load=hanging(gate, tokenizer), on_failure=told.set)
    engine.start()
    try:
        assert told.wait(30)
        assert engine.wait_until_settled(30)
        assert (engine.state, engine.broken) == (EngineState.FAILED, True)
        assert "start_timeout_s=0.5" in str(engine.failure)
    finally:
        gate.set()
        engine.close(30)


@pytest.mark.parametrize("hanging", [hanging_load, hanging_warm_up])
def test_an_engine_that_still_starts_stops_at_once(tokenizer: Tokenizer, hanging: Any) -> None:
    gate = threading.Event()
    engine = Engine(Settings(cpu_workers=1), Metrics(), load=hanging(gate, tokenizer))
    engine.start()
    started_s = time.monotonic()
    engine.close(3600)
    assert time.monotonic() - started_s < 1800
    assert (engine.state, engine.failure) == (EngineState.STOPPED, None)
    gate.set()
    engine._starter.join(30)
    for worker in engine._workers:
        worker.join(30)
    assert (engine.state, engine.failure) == (EngineState.STOPPED, None), "also once it has loaded"


def test_a_start_says_what_it_is_at(
    tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("service.engine.engine.PROGRESS_INTERVAL_S", 0.0)
    told = threading.Event()
    handler = logging.Handler()
    handler.emit = lambda record: told.set() if "loading mini" in record.getMessage() else None  # type: ignore[method-assign]
    logging.getLogger("service.engine.engine").addHandler(handler)
    caplog.set_level("INFO")
    try:
        engine = Engine(Settings(cpu_workers=1), Metrics(), load=lambda _: told.wait(60) and tokenizer)
        engine.start()
        assert engine.wait_until_settled(60)
        assert told.is_set()
        engine.close(30)
    finally:
        logging.getLogger("service.engine.engine").removeHandler(handler)


def test_every_bucket_is_run_before_the_engine_is_ready(tokenizer: Tokenizer) -> None:
    sizes: list[int] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            return getattr(tokenizer, name)

        def reconstruct(self, batch: Tensor, **options: Any) -> Tensor:
            sizes.append(len(batch))
            return tokenizer.reconstruct(batch, **options)

    with running(Counting(), batch_size=6) as engine:
        assert set(sizes) == {1, 2, 3, 4, 6}
        assert all(engine.rates.duration_s({operation: 1}, 1) > 0 for operation in operations.OPERATIONS)


def test_life_from_loading_to_stopped(tokenizer: Tokenizer) -> None:
    go = threading.Event()

    def load(_: Settings) -> Tokenizer:
        assert go.wait(30)
        return tokenizer

    engine = Engine(Settings(retry_after_s=3), Metrics(), load=load)
    engine.start()
    assert engine.state is EngineState.LOADING
    for call in (engine.check_ready, lambda: engine.tokenizer, lambda: submit(engine, ENCODE, [])):
        with pytest.raises(UnavailableError, match="still loading") as caught:
            call()
        assert caught.value.headers == {"Retry-After": "3"}
    go.set()
    assert engine.wait_until_settled(30)
    assert engine.state is EngineState.READY
    engine.start_draining()
    assert engine.state is EngineState.DRAINING
    with pytest.raises(UnavailableError, match="draining"):
        engine.check_ready()
    submit(engine, ENCODE, images(1)).future.result(30)  # admitted before, decoded since
    engine.close(30)
    assert engine.state is EngineState.STOPPED
    with pytest.raises(UnavailableError):
        submit(engine, ENCODE, images(1))


def test_draining_finishes_what_was_taken(gated: Any) -> None:
    with running(gated, batch_size=1) as engine:
        job = submit(engine, ENCODE, images(3))
        assert gated.entered.acquire(timeout=30)
        engine.start_draining()
        gated.gate.set()
        engine.close(30)
        assert job.future.result(30).shape == (3, 32, 8, 8)


def test_an_orderly_close_is_no_death(tokenizer: Tokenizer) -> None:
    """Also where the watching thread loses the CPU between its wait and its look at workers that are gone."""
    engine, told = Engine(Settings(cpu_workers=1, batch_size=1), Metrics(), load=lambda _: tokenizer), []
    engine._on_failure = lambda: told.append(engine.failure)
    reached, go = threading.Event(), threading.Event()
    wait = engine._closing.wait

    def wait_and_lose_the_cpu(timeout: float | None = None) -> bool:
        closing = wait(timeout)
        if not closing and engine.state is EngineState.READY:
            reached.set()
            assert go.wait(60)
        return closing

    engine._closing.wait = wait_and_lose_the_cpu  # type: ignore[method-assign]
    engine.start()
    assert reached.wait(60)
    engine.close(30)
    go.set()
    engine._watcher.join(30)
    assert (engine.state, engine.failure, told) == (EngineState.STOPPED, None, [])


def test_a_hang_while_draining_ends_what_was_taken_and_not_the_order(gated: Any) -> None:
    engine, told = broken_engine(gated, hang_timeout_s=0.5)
    gated.arm()
    job = submit(engine, ENCODE, images(1))
    assert gated.entered.acquire(timeout=30)
    engine.start_draining()
    with pytest.raises(UnavailableError, match="engine has failed"):
        job.future.result(30)
    engine.close(3600)
    assert (engine.state, engine.failure, told.is_set()) == (EngineState.STOPPED, None, False)
    gated.gate.set()


def test_close_gives_up_after_its_time(gated: Any) -> None:
    with running(gated, batch_size=1) as engine:
        jobs = [submit(engine, ENCODE, images(1)) for _ in range(2)]
        assert gated.entered.acquire(timeout=30)
        engine.close(0)
        for job in jobs:
            with pytest.raises(UnavailableError, match="stopped"):
                job.future.result(30)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (CheckpointError("config.json: broken"), "config.json"),
        (FusionError("fusion=triton cannot run: no GPU"), "fusion=triton"),
        (KeyError("x"), "x"),
    ],
)
def test_failed_loading_is_remembered_and_told(error: Exception, words: str) -> None:
    def load(_: Settings) -> Tokenizer:
        raise error

    told = threading.Event()
    on_failure: Callable[[], None] = told.set
    engine = Engine(Settings(), Metrics(), load=load, on_failure=on_failure)
    engine.start()
    assert told.wait(30)
    assert engine.state is EngineState.FAILED
    assert not engine.broken
    assert engine.failure is not None
    assert words in engine.failure
    with pytest.raises(UnavailableError, match="could not be loaded"):
        engine.check_ready()
    engine.close(1)
    assert engine.state is EngineState.FAILED


def test_the_settings_choose_what_computes_the_fusion(
    checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)

    def load(fusion: Any) -> Tokenizer:
        return load_tokenizer(Settings(checkpoint=str(checkpoint), device="cpu", fusion=fusion))

    assert [load(fusion).fusion_path for fusion in ("folded", "reference")] == ["folded", "reference"]
    with pytest.raises(FusionError, match="fusion=triton cannot run: the device is cpu"):
        load("triton")


@pytest.mark.parametrize(
    ("device", "num_gpus", "devices"),
    [
        ("auto", 0, ["cpu"]),
        ("cpu", 2, ["cpu"]),
        ("auto", 2, ["cuda:0", "cuda:1"]),
        ("cuda", 2, ["cuda:0", "cuda:1"]),
        ("cuda:1", 2, ["cuda:1"]),
        ("cuda:2", 2, None),
        ("cuda", 0, None),
    ],
)
def test_one_engine_a_visible_device(
    monkeypatch: pytest.MonkeyPatch, device: str, num_gpus: int, devices: list[str] | None
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: num_gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: num_gpus)
    if devices is None:
        with pytest.raises(UnavailableError, match=f"'{device}' is not there"):
            visible_devices(device)
    else:
        assert visible_devices(device) == devices


@pytest.mark.parametrize("cpus", [*range(1, 17), 64, 256])
def test_threads_and_decoders_together_are_no_more_than_the_cpus(
    cpus: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("service.engine.devices.num_cpus", lambda: cpus)
    shares = share_cpus(Settings(device="cpu", num_decoders=0))
    computing = shares.num_workers * shares.num_threads
    assert min(shares.num_workers, shares.num_threads, shares.num_decoders) >= 1
    assert computing <= cpus
    assert shares.num_decoders <= cpus
    if cpus > 2:
        assert computing + shares.num_decoders <= cpus


def test_settings_share_out_the_cpus_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("service.engine.devices.num_cpus", lambda: 16)
    assert share_cpus(Settings(device="cpu", num_decoders=0)) == CpuShares(4, 3, 4)
    assert share_cpus(Settings(device="cpu", cpu_threads=2, num_decoders=0)) == CpuShares(2, 1, 4)
    assert share_cpus(Settings(device="cpu", cpu_workers=8, cpu_threads=16, num_decoders=0)) == CpuShares(
        8, 2, 4
    )
    assert share_cpus(Settings(device="cpu", num_decoders=8)) == CpuShares(4, 2, 8)


@pytest.mark.gpu
@pytest.mark.parametrize("num_items", [1, 3, 8, 20])
def test_a_gpus_results_are_the_tokenizers(num_items: int) -> None:
    """Captured, padded, copied beside one another: the same numbers as an eager encode or decode."""
    settings = Settings(device="cuda:0", dtype="bfloat16", batch_size=8)
    tokenizer = load_tokenizer(settings)
    inputs = [image.mul(255).to(torch.uint8) for image in images(num_items, 256)]
    with running(tokenizer, device="cuda:0", batch_size=8) as engine:
        for key in (ENCODE, RECONSTRUCT, BatchKey(operations.ENCODE, "base")):
            jobs = [submit(engine, key, inputs) for _ in range(3)]
            act = tokenizer.encode if key.operation is operations.ENCODE else tokenizer.reconstruct
            expected = act(torch.stack(inputs), latent=key.latent).float().cpu()
            for job in jobs:
                torch.testing.assert_close(job.future.result(60), expected, atol=5e-2, rtol=5e-2)
