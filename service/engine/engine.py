"""The engine: jobs in, results out; a worker for each device, one queue for all of them.

Life of an engine: LOADING -> READY -> DRAINING -> STOPPED, or FAILED from any of the first three.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from weakref import WeakSet

import torch

from model.errors import ModelError
from model.images.tensors import dtype_name
from model.tokenizer import Tokenizer
from service.engine.cpu import CpuRunner
from service.engine.cuda import CudaRunner
from service.engine.devices import choose, load_tokenizer, resident_bytes, share_cpus, visible_devices
from service.engine.operations import RECONSTRUCT
from service.engine.queue import FairQueue, Job
from service.engine.rates import Rates
from service.engine.runners import Runner
from service.engine.state import FAILED_AT_WORK, EngineState, Stages
from service.engine.warming import SLACK
from service.engine.watchdog import Watchdog, Watched
from service.engine.worker import Worker
from service.errors import UnavailableError
from service.settings import Settings
from service.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.2
PROGRESS_INTERVAL_S = 5.0

Load = Callable[[Settings], Tokenizer]


class _Starter(threading.Thread):
    """The thread that loads the model, as the watchdog sees it."""

    def __init__(self, start: Callable[[], None]) -> None:
        super().__init__(target=start, name="drorae-engine", daemon=True)
        self.busy_since_s: float | None = None
        self.computes = False


class Engine(Stages):
    """Loads the model on every device, warms it, then runs jobs in batches.

    Args:
        settings: devices, buckets, timeouts.
        metrics: where batches are counted.
        load: loads the tokenizer. Called in the engine's thread, once per device, with
            `settings.device` set to it.
        on_failure: called in a thread of the engine when it fails, at loading or later.
        on_ready: called in that thread when it begins to take work.
        rates: where the cost of items is kept; its own by default.

    Attributes:
        rates: measured cost of items.
        failure: the reason of its failure; None while there is none.
        broken: whether a device hung or died, at the start or later, rather than a checkpoint or a setting
            being unusable.
        reasons: why dtype and batch size are what they are, a phrase by the setting's name; empty while
            loading.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        load: Load = load_tokenizer,
        on_failure: Callable[[], None] | None = None,
        on_ready: Callable[[], None] | None = None,
        rates: Rates | None = None,
    ) -> None:
        super().__init__(settings.retry_after_s)
        self.rates = rates or Rates()
        self.failure: str | None = None
        self.reasons: Mapping[str, str] = {}
        self._settings = settings
        self._metrics = metrics
        self._load = load
        self._on_failure = on_failure
        self._on_ready = on_ready
        self._queue = FairQueue()
        self._jobs: WeakSet[Job] = WeakSet()
        self._tokenizer: Tokenizer | None = None
        self._lock = threading.Lock()
        self._workers: list[Worker] = []
        self._batch_limit_s = settings.hang_timeout_s
        self._watchdog = Watchdog()
        self._is_stuck = False
        self._settled = threading.Event()
        self._closing = threading.Event()
        self._starter = _Starter(self._start)
        self._watcher = threading.Thread(target=self._watch, name="drorae-watch", daemon=True)
        metrics.queue_items.set_function(lambda: len(self._queue))
        metrics.ready.set_function(lambda: self._state is EngineState.READY)
        metrics.engines.set_function(lambda: len(self._workers))

    @property
    def num_workers(self) -> int:
        """Workers that share the queue; 0 while loading."""
        return len(self._workers)

    @property
    def batch_size(self) -> int:
        """Most items that go through the model at once: fewer than the setting where it is too slow."""
        return min((worker.max_items for worker in self._workers), default=self._settings.batch_size)

    @property
    def tokenizer(self) -> Tokenizer:
        """The loaded tokenizer, of the first device where there are several.

        Raises:
            UnavailableError: it is still loading, or could not be loaded.
        """
        if self._tokenizer is None:
            raise self.unavailable()
        return self._tokenizer

    def start(self) -> None:
        """Begin to load, and to work once loaded; returns at once."""
        self._starter.start()
        self._watcher.start()

    def wait_until_settled(self, timeout_s: float) -> bool:
        """Wait until loading has ended, well or not; False when that took longer than ``timeout_s``."""
        return self._settled.wait(timeout_s)

    def submit(self, job: Job) -> None:
        """Queue an admitted job, also while draining.

        Raises:
            UnavailableError: not loaded, stopped or failed.
        """
        with self._lock:
            if self._state not in (EngineState.READY, EngineState.DRAINING) or self._tokenizer is None:
                raise self.unavailable()
            self._jobs.add(job)
        self._queue.put(job)

    def cancel(self, job: Job, error: Exception, outcome: str = "cancelled") -> None:
        """Take a job back. Items that no device has begun are never computed.

        Args:
            job: settled or not.
            error: how its future is settled, if it is not yet.
            outcome: under which its waiting items are counted.
        """
        job.fail(error)
        taken_back = self._queue.remove(job)
        self._metrics.items.labels(job.key.operation.name, outcome).inc(taken_back)

    def start_draining(self) -> None:
        """Be unready; admitted jobs are still taken."""
        with self._lock:
            if self._state in (EngineState.LOADING, EngineState.READY):
                self._state = EngineState.DRAINING

    def close(self, timeout_s: float) -> None:
        """Finish the accepted jobs within ``timeout_s``, fail the rest, and stop.

        An engine that still loads is left alone: it has no jobs yet.
        """
        self.start_draining()
        self._closing.set()
        self._queue.close()
        if self._settled.is_set() and self.failure is None and not self._is_stuck:
            deadline_s = time.monotonic() + timeout_s
            for worker in self._workers:
                worker.join(max(0.0, deadline_s - time.monotonic()))
        stopped = "The service stopped before the model came to this."
        self.fail_jobs(UnavailableError(stopped, self.unavailable().headers))
        with self._lock:
            if self._state is not EngineState.FAILED:
                self._state = EngineState.STOPPED

    def fail_jobs(self, error: UnavailableError) -> None:
        """Settle every job that is not settled yet with an error."""
        with self._lock:
            jobs = list(self._jobs)
        for job in jobs:
            self.cancel(job, error, "failed")

    async def metrics_page(self) -> bytes:
        """All metrics in Prometheus' text format."""
        return self._metrics.render()

    def _start(self) -> None:
        started_s = self._starter.busy_since_s = time.monotonic()
        try:
            runners = self._load_runners()
            self._starter.busy_since_s = None
            if self._closing.is_set():
                return
            self._start_workers(runners)
        except Exception as exc:  # the thread's boundary: whatever it was, the service must say so
            if not isinstance(exc, ModelError | UnavailableError):
                logger.exception("loading %s failed unexpectedly", self._settings.checkpoint)
            self._fail(str(exc) or type(exc).__name__)
        else:
            if self._on_ready is not None:
                self._on_ready()
            with self._lock:
                if self._state is EngineState.LOADING:
                    self._state = EngineState.READY
            logger.info("%d engines ready after %.1f s", self.num_workers, time.monotonic() - started_s)
        finally:
            self._starter.busy_since_s = None
            self._settled.set()

    def _load_runners(self) -> list[Runner]:
        chosen = choose(self._settings)
        settings, self._settings, self.reasons = chosen.settings, chosen.settings, chosen.reasons
        runners: list[Runner] = []
        for device in visible_devices(settings.device):
            self._starter.computes = device == "cpu"
            tokenizer = self._load(settings.model_copy(update={"device": device}))
            if self._tokenizer is None:
                self._tokenizer = tokenizer
            if tokenizer.device.type == "cuda":
                runners.append(CudaRunner(tokenizer, settings.buckets, settings.hang_timeout_s))
                continue
            shares = share_cpus(settings)
            runners += [
                CpuRunner(
                    tokenizer, settings.buckets, f"cpu:{index}", shares.num_threads, settings.hang_timeout_s
                )
                for index in range(shares.num_workers)
            ]
        self._describe(self.tokenizer)
        return runners

    def _describe(self, tokenizer: Tokenizer) -> None:
        checkpoint = tokenizer.checkpoint
        self._metrics.model_info.labels(
            model=tokenizer.config.name,
            checkpoint_sha256=checkpoint.sha256 if checkpoint else "",
            device=str(tokenizer.device),
            dtype=dtype_name(tokenizer.dtype),
            kernel_path=tokenizer.fusion_path,
        ).set(1)

    def _start_workers(self, runners: Sequence[Runner]) -> None:
        """Start a worker for each runner, and wait until all have run every bucket.

        Raises:
            Exception: the error of a worker.
        """
        self._queue.num_engines = len(runners)
        for runner in runners:
            self._watch_memory(runner.name)
            probe = partial(self._probe, runner)
            self._workers.append(Worker(runner, self._queue, probe, self.rates, self._metrics))
        for worker in self._workers:
            worker.start()
        for worker in self._workers:
            worker.warmed.wait()
            if worker.failure is not None:
                raise worker.failure
        self._allow_for_slowness()

    def _allow_for_slowness(self) -> None:
        """Say which batch sizes were left out; where what is left is still slow, it gets more time."""
        settings = self._settings
        advice = f"too slow here for hang_timeout_s={settings.hang_timeout_s:g}"
        if self.batch_size < settings.batch_size:
            logger.warning(
                "batches of more than %d items are %s and are left out: raise it, or lower batch_size=%d",
                *(self.batch_size, advice, settings.batch_size),
            )
            self.reasons = {**self.reasons, "batch_size": f"a batch of {settings.batch_size} is {advice}"}
        needed_s = SLACK * max(worker.batch_s for worker in self._workers)
        if needed_s > self._batch_limit_s:
            self._batch_limit_s = needed_s
            logger.warning("a batch of %d is %s: it may take %.3g s", self.batch_size, advice, needed_s)

    def _probe(self, runner: Runner) -> None:
        runner.launch(RECONSTRUCT.usual, [RECONSTRUCT.sample(self.tokenizer)]).wait()

    def _watch_memory(self, name: str) -> None:
        gauge = self._metrics.device_memory_bytes
        if name.startswith("cuda"):
            gauge.labels(name).set_function(lambda: torch.cuda.memory_reserved(name))
        else:
            gauge.labels("cpu").set_function(resident_bytes)

    def _watch(self) -> None:
        """Look after the threads until the engine closes; the first that hangs or ends is its failure."""
        started_s = told_s = time.monotonic()
        while not self._closing.wait(WATCH_INTERVAL_S):
            threads: list[Watched] = [self._starter, *self._workers]
            now_s = time.monotonic()
            if self._state is EngineState.LOADING and now_s - told_s >= PROGRESS_INTERVAL_S:
                told_s = now_s
                logger.info("%s, for %.0f s so far", self._activity(), now_s - started_s)
            self._watchdog.look(threads)
            problem = next(filter(None, (self._problem(thread) for thread in threads)), None)
            # Workers end in order once the engine closes, which may have been since the wait.
            if problem is not None and not self._closing.is_set():
                self._fail_working(problem)
                return

    def _activity(self) -> str:
        if not self._workers:
            return f"loading {self._settings.checkpoint}"
        num_warm = sum(worker.warmed.is_set() for worker in self._workers)
        return f"warming, {num_warm} of {self.num_workers} engines are done"

    def _problem(self, thread: Watched) -> str | None:
        """Why a thread is lost."""
        counted_s = self._watchdog.counted_s(thread)
        if isinstance(thread, Worker) and thread.warmed.is_set():
            if not thread.is_alive() and self._settled.is_set():
                return f"{thread.name} ended: {thread.failure!r}"
            if counted_s > self._batch_limit_s:
                return f"{thread.name} has been busy with one batch for over {self._batch_limit_s:g} s"
        elif counted_s > self._settings.start_timeout_s:
            limit_s = self._settings.start_timeout_s
            return f"{thread.name} got nowhere for start_timeout_s={limit_s:g} ({self._activity()})"
        return None

    def _fail_working(self, problem: str) -> None:
        logger.critical("the engine failed: %s", problem)
        self._is_stuck = True
        self._fail(f"the engine failed: {problem}", broken=True)
        self._settled.set()
        self.fail_jobs(UnavailableError(FAILED_AT_WORK, self.unavailable().headers))

    def _fail(self, reason: str, broken: bool = False) -> None:
        """Be failed, unless that was so before, or the service stops anyway."""
        with self._lock:
            if self._state not in (EngineState.LOADING, EngineState.READY):
                return
            self.failure, self.broken = reason, broken
            self._state = EngineState.FAILED
        if self._on_failure is not None:
            self._on_failure()
        else:
            logger.error("%s", reason)
