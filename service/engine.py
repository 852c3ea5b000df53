"""The engine: jobs in, results out; a worker for each device, one queue for all of them.

Life of an engine: LOADING -> READY -> DRAINING -> STOPPED, or FAILED from any of the first three.
"""

import logging
import os
import threading
import time
from collections.abc import Callable, Sequence
from enum import StrEnum
from functools import partial

import torch

from model.errors import ModelError
from model.tokenizer import Tokenizer
from service.batching import BatchKey, FairQueue, Job, Operation
from service.errors import UnavailableError
from service.metrics import Metrics
from service.rates import Rates
from service.runner import CudaRunner, HostRunner, Runner, sample_inputs
from service.settings import Settings
from service.worker import Worker

logger = logging.getLogger(__name__)

WATCH_INTERVAL_S = 0.2
MAX_CPU_WORKERS = 4

Load = Callable[[Settings], Tokenizer]


class EngineState(StrEnum):
    """Where an engine is in its life."""

    LOADING = "loading"
    READY = "ready"
    DRAINING = "draining"
    STOPPED = "stopped"
    FAILED = "failed"


def load_tokenizer(settings: Settings) -> Tokenizer:
    """Load the tokenizer that the settings name, on the device that they name.

    Raises:
        model.errors.CheckpointError: it cannot be loaded.
        model.errors.FusionError: the implementation of the fusion that they force cannot run here.
        UnavailableError: the device does not exist here.
    """
    device = visible_devices(settings.device)[0]
    dtype = getattr(torch, settings.dtype)
    return Tokenizer.load(settings.checkpoint, device=device, dtype=dtype, fusion=settings.fusion)


def visible_devices(device: str) -> list[str]:
    """The devices that a setting means: ``auto`` and ``cuda`` stand for every visible GPU.

    Raises:
        UnavailableError: there is no such device here.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device == "cpu" or (device == "auto" and num_gpus == 0):
        return ["cpu"]
    if num_gpus == 0:
        raise UnavailableError(f"The device {device!r} is not there: PyTorch sees no GPU.")
    if device in ("auto", "cuda"):
        return [f"cuda:{index}" for index in range(num_gpus)]
    if int(device.removeprefix("cuda:")) >= num_gpus:
        raise UnavailableError(f"The device {device!r} is not there: PyTorch sees {num_gpus} GPUs.")
    return [device]


class Engine:
    """Loads the model on every device, warms it, then runs jobs in batches.

    Args:
        settings: devices, buckets, timeouts.
        metrics: where batches are counted.
        load: gives the tokenizer for the one device in the settings it is given; called in the engine's
            thread.
        on_failure: called, in a thread of the engine's, when it failed, at loading or later.
        on_ready: called there when it begins to take work.

    Attributes:
        rates: what items cost, as measured.
        failure: why it failed; None unless it did.
        broken: whether it failed after it had been ready.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        load: Load = load_tokenizer,
        on_failure: Callable[[], None] | None = None,
        on_ready: Callable[[], None] | None = None,
    ) -> None:
        self.rates = Rates()
        self.failure: str | None = None
        self.broken = False
        self._settings = settings
        self._metrics = metrics
        self._load = load
        self._on_failure = on_failure
        self._on_ready = on_ready
        self._queue = FairQueue()
        self._jobs: set[Job] = set()
        self._tokenizer: Tokenizer | None = None
        self._state = EngineState.LOADING
        self._lock = threading.Lock()
        self._workers: list[Worker] = []
        self._settled = threading.Event()
        self._closing = threading.Event()
        self._starter = threading.Thread(target=self._start, name="drorae-engine", daemon=True)
        metrics.queue_items.set_function(lambda: len(self._queue))
        metrics.ready.set_function(lambda: self._state is EngineState.READY)
        metrics.engines.set_function(lambda: len(self._workers))

    @property
    def state(self) -> EngineState:
        """Where it is in its life."""
        return self._state

    @property
    def closing(self) -> bool:
        """Whether it will never take work again."""
        return self.broken or self._state in (EngineState.DRAINING, EngineState.STOPPED)

    @property
    def num_workers(self) -> int:
        """Workers that share the queue; 0 while loading."""
        return len(self._workers)

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

    def wait_until_settled(self, timeout_s: float) -> bool:
        """Wait until loading has ended, well or not; False when that took longer than ``timeout_s``."""
        return self._settled.wait(timeout_s)

    def check_ready(self) -> None:
        """Refuse work that cannot be taken now.

        Raises:
            UnavailableError: not ready.
        """
        if self._state is not EngineState.READY:
            raise self.unavailable()

    def submit(self, job: Job) -> None:
        """Queue an admitted job, also while draining.

        Raises:
            UnavailableError: not loaded, stopped or failed.
        """
        with self._lock:
            if self._state not in (EngineState.READY, EngineState.DRAINING) or self._tokenizer is None:
                raise self.unavailable()
            self._jobs.add(job)
        job.future.add_done_callback(lambda _: self._jobs.discard(job))
        self._queue.put(job)

    def cancel(self, job: Job, error: Exception, outcome: str = "cancelled") -> None:
        """Take a job back: what no device has begun never will be.

        Args:
            job: settled or not.
            error: how its future is settled, if it is not yet.
            outcome: what its waiting items count as.
        """
        job.fail(error)
        taken_back = self._queue.remove(job)
        self._metrics.items.labels(job.key.operation, outcome).inc(taken_back)

    def start_draining(self) -> None:
        """Be unready; admitted jobs are still taken."""
        with self._lock:
            if self._state in (EngineState.LOADING, EngineState.READY):
                self._state = EngineState.DRAINING

    def close(self, timeout_s: float) -> None:
        """Finish what was taken for at most ``timeout_s``, fail whatever remains, and stop."""
        self.start_draining()
        self._closing.set()
        self._queue.close()
        deadline_s = time.monotonic() + (0.0 if self._state is EngineState.FAILED else timeout_s)
        for worker in self._workers:
            worker.join(max(0.0, deadline_s - time.monotonic()))
        self.fail_jobs(UnavailableError("The service stopped before the model came to this."))
        with self._lock:
            if self._state is not EngineState.FAILED:
                self._state = EngineState.STOPPED

    def fail_jobs(self, error: UnavailableError) -> None:
        """Settle every job that is not settled yet with an error."""
        for job in list(self._jobs):
            self.cancel(job, error, "failed")

    def unavailable(self) -> UnavailableError:
        """Why no work is taken now."""
        details = {
            EngineState.LOADING: "The model is still loading.",
            EngineState.FAILED: "The model could not be loaded; the service's log says why.",
        }
        detail = details.get(self._state, "The service is draining and takes no new work.")
        if self.broken:
            detail = "The engine has failed and the service is about to stop; its log says why."
        return UnavailableError(detail, {"Retry-After": str(self._settings.retry_after_s)})

    def _start(self) -> None:
        started_s = time.monotonic()
        try:
            self._start_workers(self._load_runners())
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
            self._settled.set()
        if self.failure is None:
            self._watch()

    def _load_runners(self) -> list[Runner]:
        settings = self._settings
        runners: list[Runner] = []
        for device in visible_devices(settings.device):
            tokenizer = self._load(settings.model_copy(update={"device": device}))
            if self._tokenizer is None:
                self._tokenizer = tokenizer
            if tokenizer.device.type == "cuda":
                runners.append(CudaRunner(tokenizer, settings.buckets))
                continue
            num_workers, num_threads = share_cores(settings.cpu_workers, settings.cpu_threads)
            runners += [
                HostRunner(tokenizer, settings.buckets, f"cpu:{index}", num_threads)
                for index in range(num_workers)
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
            Exception: what a worker failed with.
            UnavailableError: a batch takes so long that it would count as hung.
        """
        self._queue.num_engines = len(runners)
        for runner in runners:
            self._watch_memory(runner.name)
            probe = partial(self._probe, runner)
            self._workers.append(Worker(runner, self._queue, probe, self.rates, self._metrics))
            self._workers[-1].start()
        for worker in self._workers:
            worker.warmed.wait()
            if worker.failure is not None:
                raise worker.failure
        largest, limit_s = self._settings.batch_size, self._settings.hang_timeout_s
        for operation in Operation:
            duration_s = self.rates.duration_s({operation: largest}, 1)
            told = f"a batch of {largest} to {operation} takes {duration_s:.1f} s here"
            if duration_s > limit_s:
                raise UnavailableError(
                    f"{told}, longer than hang_timeout_s={limit_s:g}: raise that, or lower batch_size"
                )
            if duration_s > limit_s / 2:
                logger.warning("%s, more than half of hang_timeout_s=%g", told, limit_s)

    def _probe(self, runner: Runner) -> None:
        key = BatchKey(Operation.RECONSTRUCT)
        runner.launch(key, sample_inputs(self.tokenizer, key, 1)).wait()

    def _watch_memory(self, name: str) -> None:
        gauge = self._metrics.device_memory_bytes
        if name.startswith("cuda"):
            gauge.labels(name).set_function(lambda: torch.cuda.memory_reserved(name))
        else:
            gauge.labels("cpu").set_function(resident_bytes)

    def _watch(self) -> None:
        """Look after the workers until the engine closes; the first that hangs or ends is its failure."""
        limit_s = self._settings.hang_timeout_s
        while not self._closing.wait(WATCH_INTERVAL_S):
            for worker in self._workers:
                if worker.busy_s() > limit_s:
                    self._fail_working(f"{worker.name} has been busy with one batch for over {limit_s:g} s")
                    return
                if not worker.is_alive():
                    self._fail_working(f"{worker.name} ended: {worker.failure!r}")
                    return

    def _fail_working(self, reason: str) -> None:
        logger.critical("the engine failed: %s", reason)
        self.broken = True
        self._fail(f"the engine failed: {reason}")
        self.fail_jobs(self.unavailable())

    def _fail(self, reason: str) -> None:
        with self._lock:
            self.failure = reason
            self._state = EngineState.FAILED
        if self._on_failure is not None:
            self._on_failure()
        else:
            logger.error("%s", reason)


def share_cores(num_workers: int, num_threads: int) -> tuple[int, int]:
    """Workers of a CPU and the threads of each, from the settings ``cpu_workers`` and ``cpu_threads``.

    A batch gains less from a second core than a second batch does (on two cores, 47 images a second by two
    single-threaded workers, 40 by one with two threads), and one that shares its cores with decoders does
    not make a second thread wait.
    """
    cores = num_threads or len(os.sched_getaffinity(0))
    workers = num_workers or min(cores, MAX_CPU_WORKERS)
    return workers, max(1, cores // workers)


def resident_bytes() -> float:
    """Memory of this process that is resident, bytes; 0 where the system does not tell."""
    try:
        with open("/proc/self/statm", encoding="ascii") as stream:
            return float(int(stream.read().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
    except OSError:
        return 0.0


def dtype_name(dtype: torch.dtype) -> str:
    """``float16`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")
