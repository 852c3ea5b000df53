"""The engine: futures, batching, deadlines, failures, the end."""

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from model.errors import CheckpointError, FusionError, LatentError
from model.tokenizer import Tokenizer
from service.batching import BatchKey, Item, Operation
from service.engine import EngineState, ThreadEngine, load_tokenizer
from service.errors import DeadlineError, InternalError, LatentsError, QueueFullError, UnavailableError
from service.metrics import Metrics
from service.settings import Settings

FAR_S = float("inf")
ENCODE = BatchKey(Operation.ENCODE)
DECODE = BatchKey(Operation.DECODE)


@contextmanager
def running(tokenizer: Any, **settings: Any) -> Iterator[ThreadEngine]:
    engine = ThreadEngine(Settings(**settings), Metrics(), load=lambda _: tokenizer)
    engine.start()
    assert engine.wait_until_settled(30)
    try:
        yield engine
    finally:
        getattr(tokenizer, "gate", threading.Event()).set()
        engine.close(30)


def images(num_items: int, side: int = 64) -> list[Tensor]:
    return list(torch.rand((num_items, 3, side, side), generator=torch.Generator().manual_seed(3)))


def items(key: BatchKey, tensors: list[Tensor]) -> list[Item]:
    return [Item(key, tensor) for tensor in tensors]


def results(futures: list[Future[Tensor]]) -> Tensor:
    return torch.stack([future.result(30) for future in futures])


def sample(engine: ThreadEngine, name: str, **labels: str) -> float | None:
    return engine._metrics.registry.get_sample_value(name, labels)


def test_results_are_the_tokenizers(tokenizer: Tokenizer) -> None:
    inputs = images(3)
    with running(tokenizer) as engine:
        for key in (ENCODE, BatchKey(Operation.ENCODE, "base"), BatchKey(Operation.ENCODE, normalize=True)):
            expected = tokenizer.encode(torch.stack(inputs), latent=key.latent, normalize=key.normalize)
            torch.testing.assert_close(results(engine.submit(items(key, inputs), FAR_S)), expected)
        latents = tokenizer.encode(torch.stack(inputs))
        decoded = results(engine.submit(items(DECODE, list(latents)), FAR_S))
        torch.testing.assert_close(decoded, tokenizer.decode(latents))
        reconstructed = results(engine.submit(items(BatchKey(Operation.RECONSTRUCT), inputs), FAR_S))
        torch.testing.assert_close(reconstructed, decoded)
        assert sample(engine, "drorae_items_total", operation="encode", outcome="ok") == 9


def test_waiting_items_share_batches(gated: Any) -> None:
    with running(gated, batch_size=4) as engine:
        first = engine.submit(items(ENCODE, images(1)), FAR_S)
        assert gated.entered.acquire(timeout=30)
        second = engine.submit(items(ENCODE, images(3)), FAR_S)
        third = engine.submit(items(ENCODE, images(3)), FAR_S)
        gated.gate.set()
        results(first + second + third)
        assert gated.batch_sizes == [1, 4, 2]
        assert sample(engine, "drorae_batch_items_sum", operation="encode") == 7


def test_full_queue_refuses(gated: Any) -> None:
    with running(gated, batch_size=1, queue_limit_items=2, max_items_per_request=2) as engine:
        taken = engine.submit(items(ENCODE, images(1)), FAR_S)
        assert gated.entered.acquire(timeout=30)
        waiting = engine.submit(items(ENCODE, images(2)), FAR_S)
        assert sample(engine, "drorae_queue_items") == 2
        with pytest.raises(QueueFullError):
            engine.check_ready()
        with pytest.raises(QueueFullError):
            engine.submit(items(ENCODE, images(1)), FAR_S)
        gated.gate.set()
        results(taken + waiting)
        engine.check_ready()


def test_expired_and_cancelled_items_are_skipped(gated: Any) -> None:
    with running(gated) as engine:
        first = engine.submit(items(ENCODE, images(1)), FAR_S)
        assert gated.entered.acquire(timeout=30)
        expired, cancelled, good = engine.submit(
            items(ENCODE, images(1)), time.monotonic() - 1
        ) + engine.submit(items(ENCODE, images(2)), FAR_S)
        assert cancelled.cancel()
        gated.gate.set()
        results([*first, good])
        with pytest.raises(DeadlineError):
            expired.result(30)
        assert gated.batch_sizes == [1, 1]
        assert sample(engine, "drorae_items_total", operation="encode", outcome="expired") == 1
        assert sample(engine, "drorae_items_total", operation="encode", outcome="cancelled") == 1


class Fussy:
    """A tokenizer that fails on batches that hold a marked item."""

    def __init__(self, tokenizer: Tokenizer, error: Exception) -> None:
        self._tokenizer = tokenizer
        self._error = error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def encode(self, batch: Tensor, **options: Any) -> Tensor:
        if (batch.flatten(1).amin(dim=1) < 0).any():
            raise self._error
        return self._tokenizer.encode(batch, **options)


@pytest.mark.parametrize(
    ("error", "seen"), [(RuntimeError("kernel failed"), InternalError), (LatentError("no"), LatentError)]
)
def test_a_failing_item_fails_alone(
    tokenizer: Tokenizer, gated: Any, error: Exception, seen: type[Exception]
) -> None:
    inputs = images(3)
    inputs[1] = inputs[1] - 5
    gated._tokenizer = Fussy(tokenizer, error)
    with running(gated) as engine:
        first = engine.submit(items(ENCODE, images(1)), FAR_S)
        assert gated.entered.acquire(timeout=30)
        futures = engine.submit(items(ENCODE, inputs), FAR_S)
        gated.gate.set()
        results([*first, futures[0], futures[2]])
        with pytest.raises(seen):
            futures[1].result(30)
        results(engine.submit(items(ENCODE, images(1)), FAR_S))


def test_overflow_is_an_error_and_not_a_nan(tokenizer: Tokenizer) -> None:
    with running(tokenizer) as engine:
        huge, fine = engine.submit(
            items(DECODE, [torch.full((32, 8, 8), 3e38), torch.zeros((32, 8, 8))]), FAR_S
        )
        with pytest.raises(LatentsError, match="overflow"):
            huge.result(30)
        assert torch.isfinite(fine.result(30)).all()


def test_life_from_loading_to_stopped(tokenizer: Tokenizer) -> None:
    go = threading.Event()

    def load(_: Settings) -> Tokenizer:
        assert go.wait(30)
        return tokenizer

    engine = ThreadEngine(Settings(retry_after_s=3), Metrics(), load=load)
    engine.start()
    assert engine.state is EngineState.LOADING
    for call in (engine.check_ready, lambda: engine.tokenizer, lambda: engine.submit([], FAR_S)):
        with pytest.raises(UnavailableError, match="still loading") as caught:
            call()
        assert caught.value.headers == {"Retry-After": "3"}
    go.set()
    assert engine.wait_until_settled(30)
    assert engine.state is EngineState.READY
    engine.start_draining()
    assert engine.state is EngineState.DRAINING
    with pytest.raises(UnavailableError, match="draining"):
        engine.submit([], FAR_S)
    assert engine.tokenizer is tokenizer
    engine.close(30)
    assert engine.state is EngineState.STOPPED


def test_draining_finishes_what_was_taken(gated: Any) -> None:
    engine = ThreadEngine(Settings(batch_size=1), Metrics(), load=lambda _: gated)
    engine.start()
    assert engine.wait_until_settled(30)
    futures = engine.submit(items(ENCODE, images(3)), FAR_S)
    assert gated.entered.acquire(timeout=30)
    engine.start_draining()
    gated.gate.set()
    engine.close(30)
    assert results(futures).shape == (3, 32, 8, 8)


def test_close_gives_up_after_its_time(gated: Any) -> None:
    engine = ThreadEngine(Settings(batch_size=1), Metrics(), load=lambda _: gated)
    engine.start()
    assert engine.wait_until_settled(30)
    running_one, waiting_one = engine.submit(items(ENCODE, images(2)), FAR_S)
    assert gated.entered.acquire(timeout=30)
    engine.close(0)
    with pytest.raises(UnavailableError, match="stopped"):
        waiting_one.result(30)
    gated.gate.set()
    running_one.result(30)


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
    engine = ThreadEngine(Settings(), Metrics(), load=load, on_failure=on_failure)
    engine.start()
    assert told.wait(30)
    assert engine.state is EngineState.FAILED
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
