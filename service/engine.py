"""The engine: items in, futures out, model work in one thread of its own.

Life of an engine: LOADING -> READY -> DRAINING -> STOPPED, or LOADING -> FAILED.
"""

import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from enum import StrEnum
from typing import Protocol

import torch
from torch import Tensor

from model.errors import ModelError
from model.tokenizer import Tokenizer
from service.batching import BatchKey, BatchQueue, Item, Operation, Ticket
from service.errors import DeadlineError, InternalError, LatentsError, UnavailableError
from service.metrics import Metrics
from service.settings import Settings

logger = logging.getLogger(__name__)


class EngineState(StrEnum):
    """Where an engine is in its life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


class Engine(Protocol):
    """What request handlers need of an engine, whichever way it batches."""

    failure: str | None
    """Why the model could not be loaded; None unless it failed."""

    @property
    def state(self) -> EngineState:
        """Where it is in its life."""
        ...

    @property
    def tokenizer(self) -> Tokenizer:
        """The loaded tokenizer.

        Raises:
            UnavailableError: it is still loading, or could not be loaded.
        """
        ...

    def start(self) -> None:
        """Begin to load, and to work once loaded; returns at once."""
        ...

    def check_ready(self) -> None:
        """Refuse work that could not be taken now.

        Raises:
            UnavailableError: not ready.
            QueueFullError: not even one item would fit.
        """
        ...

    def unavailable(self) -> UnavailableError:
        """Why no work is taken now."""
        ...

    def submit(self, items: Sequence[Item], deadline_s: float) -> list[Future[Tensor]]:
        """Queue all items or none; ``deadline_s`` is on the clock of `time.monotonic`.

        Returns:
            One future per item, float32 on the CPU: a latent [C, h, w] or an image [3, S, S]. A
            cancelled future's item is skipped if the model has not begun it.

        Raises:
            UnavailableError: not ready.
            QueueFullError: they do not fit.
        """
        ...

    def start_draining(self) -> None:
        """Take no new items; finish those that were taken."""
        ...

    def close(self, timeout_s: float) -> None:
        """Drain for at most ``timeout_s``, then fail whatever still waits and stop."""
        ...


def load_tokenizer(settings: Settings) -> Tokenizer:
    """Load the tokenizer that the settings name.

    Raises:
        model.errors.CheckpointError: it cannot be loaded.
        model.errors.FusionError: the implementation of the fusion that they force cannot run here.
        UnavailableError: the device does not exist here.
    """
    device = settings.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device.startswith("cuda") and not torch.cuda.is_available():
        raise UnavailableError(f"The device {device!r} is not there: PyTorch sees no GPU.")
    dtype = getattr(torch, settings.dtype)
    return Tokenizer.load(settings.checkpoint, device=device, dtype=dtype, fusion=settings.fusion)


class ThreadEngine:
    """One thread that loads the model, warms it, then serves batches of compatible items.

    Args:
        settings: queue limit, batch size.
        metrics: where batches are counted.
        load: gives the tokenizer; called in the engine's thread.
        on_failure: called in the engine's thread when loading failed, to tell `failure`; else it is logged.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        load: Callable[[Settings], Tokenizer] = load_tokenizer,
        on_failure: Callable[[], None] | None = None,
    ) -> None:
        self._settings = settings
        self._metrics = metrics
        self._load = load
        self._on_failure = on_failure
        self._queue = BatchQueue(settings.queue_limit_items, settings.retry_after_s)
        self._tokenizer: Tokenizer | None = None
        self._state = EngineState.LOADING
        self._state_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="drorae-model", daemon=True)
        self._settled = threading.Event()
        self.failure: str | None = None
        metrics.queue_items.set_function(lambda: len(self._queue))
        metrics.ready.set_function(lambda: self._state is EngineState.READY)

    @property
    def state(self) -> EngineState:
        return self._state

    @property
    def tokenizer(self) -> Tokenizer:
        if self._tokenizer is None:
            raise self.unavailable()
        return self._tokenizer

    def start(self) -> None:
        self._thread.start()

    def wait_until_settled(self, timeout_s: float) -> bool:
        """Wait until loading has ended, well or not; False when that took longer than ``timeout_s``."""
        return self._settled.wait(timeout_s)

    def check_ready(self) -> None:
        if self._state is not EngineState.READY:
            raise self.unavailable()
        self._queue.check_room(1)

    def submit(self, items: Sequence[Item], deadline_s: float) -> list[Future[Tensor]]:
        tickets = [Ticket(item, deadline_s) for item in items]
        with self._state_lock:
            if self._state is not EngineState.READY:
                raise self.unavailable()
            self._queue.put(tickets)
        return [ticket.future for ticket in tickets]

    def start_draining(self) -> None:
        with self._state_lock:
            if self._state in (EngineState.LOADING, EngineState.READY):
                self._state = EngineState.DRAINING
        self._queue.close()

    def close(self, timeout_s: float) -> None:
        self.start_draining()
        if self._tokenizer is not None and self._thread.ident is not None:
            self._thread.join(timeout_s)
        for ticket in self._queue.clear():
            if ticket.future.set_running_or_notify_cancel():
                error = UnavailableError("The service stopped before the model came to this item.")
                ticket.future.set_exception(error)
        with self._state_lock:
            if self._state is not EngineState.FAILED:
                self._state = EngineState.STOPPED

    def unavailable(self) -> UnavailableError:
        details = {
            EngineState.LOADING: "The model is still loading.",
            EngineState.FAILED: "The model could not be loaded; the service's log says why.",
        }
        detail = details.get(self._state, "The service is draining and takes no new work.")
        return UnavailableError(detail, {"Retry-After": str(self._settings.retry_after_s)})

    def _run(self) -> None:
        prepared = self._prepare()
        self._settled.set()
        if not prepared:
            return
        while tickets := self._queue.take(self._settings.batch_size):
            self._serve(tickets)

    def _prepare(self) -> bool:
        """Load and warm the model; False when that failed."""
        started_s = time.monotonic()
        try:
            tokenizer = self._load(self._settings)
            _warm(tokenizer)
        except Exception as exc:  # the worker's boundary: whatever it was, the service must say so
            if not isinstance(exc, (ModelError, UnavailableError)):
                logger.exception("loading %s failed unexpectedly", self._settings.checkpoint)
            with self._state_lock:
                self.failure = str(exc) or type(exc).__name__
                self._state = EngineState.FAILED
            if self._on_failure is None:
                logger.error("the model could not be loaded: %s", self.failure)
            else:
                self._on_failure()
            return False
        checkpoint = tokenizer.checkpoint
        self._metrics.model_info.labels(
            model=tokenizer.config.name,
            checkpoint_sha256=checkpoint.sha256 if checkpoint else "",
            device=str(tokenizer.device),
            dtype=dtype_name(tokenizer.dtype),
            kernel_path=tokenizer.fusion_path,
        ).set(1)
        with self._state_lock:
            self._tokenizer = tokenizer
            if self._state is EngineState.LOADING:
                self._state = EngineState.READY
        logger.info("model %s ready after %.1f s", tokenizer.config.name, time.monotonic() - started_s)
        return True

    def _serve(self, tickets: list[Ticket]) -> None:
        live = [ticket for ticket in tickets if self._begin(ticket)]
        if not live:
            return
        try:
            results = self._compute(live)
        except Exception as exc:  # the worker's boundary: a bad item must not end the thread
            self._serve_apart(live, exc)
            return
        for ticket, result in zip(live, results, strict=True):
            self._finish(ticket, result)

    def _serve_apart(self, tickets: list[Ticket], error: Exception) -> None:
        """After a batch failed: compute its items one by one, so that only the culprit's request fails."""
        if len(tickets) == 1:
            if not isinstance(error, ModelError):
                logger.error("the model failed on an item", exc_info=error)
                error = InternalError("The model failed on this item; the service's log has the details.")
            self._count(tickets[0], "failed")
            tickets[0].future.set_exception(error)
            return
        for ticket in tickets:
            try:
                result = self._compute([ticket])[0]
            except Exception as exc:  # the worker's boundary
                self._serve_apart([ticket], exc)
            else:
                self._finish(ticket, result)

    def _begin(self, ticket: Ticket) -> bool:
        """Whether the ticket is still wanted; its future is running then."""
        if not ticket.future.set_running_or_notify_cancel():
            self._count(ticket, "cancelled")
            return False
        now_s = time.monotonic()
        self._metrics.queue_seconds.labels(ticket.item.key.operation).observe(now_s - ticket.enqueued_s)
        if now_s >= ticket.deadline_s:
            self._count(ticket, "expired")
            ticket.future.set_exception(
                DeadlineError("The deadline passed while the request waited for the model.")
            )
            return False
        return True

    def _compute(self, tickets: list[Ticket]) -> Tensor:
        assert self._tokenizer is not None
        key = tickets[0].item.key
        started_s = time.monotonic()
        results = compute(self._tokenizer, key, torch.stack([ticket.item.tensor for ticket in tickets]))
        self._metrics.device_seconds.labels(key.operation).observe(time.monotonic() - started_s)
        self._metrics.batch_items.labels(key.operation).observe(len(tickets))
        return results

    def _finish(self, ticket: Ticket, result: Tensor) -> None:
        if torch.isfinite(result).all():
            self._count(ticket, "ok")
            ticket.future.set_result(result)
        else:
            self._count(ticket, "failed")
            ticket.future.set_exception(
                LatentsError("The model's result overflows: the values given are too large for it.")
            )

    def _count(self, ticket: Ticket, outcome: str) -> None:
        self._metrics.items.labels(ticket.item.key.operation, outcome).inc()


def compute(tokenizer: Tokenizer, key: BatchKey, batch: Tensor) -> Tensor:
    """Run one batch, [B, 3, S, S] or [B, C, h, w]; float32 on the CPU comes back.

    Raises:
        model.errors.ModelError: the tokenizer refuses the batch.
    """
    with torch.inference_mode():
        match key.operation:
            case Operation.ENCODE:
                result = tokenizer.encode(batch, latent=key.latent, normalize=key.normalize)
            case Operation.DECODE:
                result = tokenizer.decode(batch, normalize=key.normalize)
            case Operation.RECONSTRUCT:
                result = tokenizer.reconstruct(batch, latent=key.latent)
        return result.float().cpu()


def dtype_name(dtype: torch.dtype) -> str:
    """``float16`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")


def _warm(tokenizer: Tokenizer) -> None:
    """Run every operation once, so that the first request does not pay for what is lazy."""
    side = tokenizer.config.image_size
    compute(tokenizer, BatchKey(Operation.RECONSTRUCT), torch.full((1, 3, side, side), 0.5))
