"""The pool of decoder processes, driven by the event loop.

Images are decoded in processes of their own because threads would have to share the interpreter with the
event loop, and because a decoder that crashes or hangs on a hostile file then takes nothing with it: it is
started again, and the image that it was at is tried once more.

Requests take turns, one image each. Images that a request no longer needs are withdrawn. A decoder cannot be
interrupted: large images are kept from one of the decoders, and a decoder is ended once nobody waits for it.
"""

import asyncio
import logging
import math
import signal
from collections import OrderedDict
from collections.abc import Coroutine, Sequence

from torch import Tensor

from service.errors import MalformedError, TooLargeError, UnavailableError
from service.photos.decode import ImagePart, ImageRules
from service.photos.link import DecoderLink, ImageRequest, Job
from service.photos.process import CPU_SIGNAL
from service.photos.room import PixelLimits, PixelRoom
from service.processes.tally import Tally
from service.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 2
"""Attempts per image. A decoder can die for unrelated reasons, so the image is tried once more."""
_MODULE = "service.photos.process"
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 5.0
_START_S = 5.0
_MAX_FAILED_STARTS = 3  # in a row, after which nobody waits for a decoder
_SLOW_S = 0.5  # of an image: its request is served like one of large images
_CHECKS_PER_TIMEOUT = 4
_LEAST_CHECK_S = 0.1  # the system counts CPU time in steps of 10 ms
_MANY_PARTS = 4  # whose headers are read in a thread


class Decoders:
    """Processes that decode image files; all methods belong to the event loop's thread.

    Args:
        num_processes: how many.
        timeout_s: how long a decoder may make no progress, seconds, before it is replaced.
        metrics: where decoders that fail are counted.
        limits: most pixels that are taken.
        tally: where pixels are counted, of all processes that decode.
    """

    def __init__(
        self,
        num_processes: int,
        timeout_s: float,
        metrics: Metrics,
        limits: PixelLimits | None = None,
        tally: Tally | None = None,
    ) -> None:
        self.num_processes = num_processes
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._limits = limits or PixelLimits()
        self._room = PixelRoom(self._limits, num_processes, metrics, tally or Tally())
        self._decoders: list[DecoderLink] = []
        self._waiting: OrderedDict[ImageRequest, None] = OrderedDict()  # they take turns, the first is next
        self._num_failed_starts = 0  # since a decoder last answered
        self._closed = False
        self._begun = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_ready(self) -> bool:
        """Whether a decoder is alive and answers."""
        return any(link.responds for link in self._decoders)

    async def start(self) -> None:
        """Start the processes and wait, within reason, until one is ready or has failed.

        Those that cannot be started are tried again.
        """
        self._keep(self._watch())
        for _ in range(self.num_processes):
            self._keep(self._add())
        try:
            async with asyncio.timeout(_START_S):
                await self._begun.wait()
        except TimeoutError:
            logger.warning("no decoder was ready after %g s", _START_S)

    async def decode(
        self, parts: Sequence[ImagePart], rules: ImageRules, deadline_s: float = math.inf
    ) -> list[Tensor]:
        """Image files to tensors, each [3, S, S] uint8, a view of interleaved pixels.

        When this ends, well, with an error or cancelled, no decoder begins any of its images any more.

        Args:
            parts: the files.
            rules: limits, size and fit.
            deadline_s: when they must be decoded, on the clock of `time.monotonic`.

        Raises:
            QueueFullError: no room for so many pixels.
            UnavailableError: no decoder can be had, or none came to an end with an image.
            ServiceError: one cannot be read; the sentence names it.
        """
        pixels = await self._judge(parts, rules)
        if self._closed:
            raise self._unavailable("The service is draining and takes no new work.")
        if self._has_given_up():
            raise self.unavailable()
        with self._room.reserve(sum(pixels), deadline_s):
            loop, request = asyncio.get_running_loop(), ImageRequest()
            jobs = [
                Job(request, part, rules, count, loop.create_future())
                for part, count in zip(parts, pixels, strict=True)
            ]
            request.waiting.extend(jobs)
            self._waiting[request] = None
            self._assign()
            try:
                return await asyncio.gather(*(job.future for job in jobs))
            finally:
                self._withdraw(request, jobs)

    def unavailable(self) -> UnavailableError:
        """Why no image is decoded now."""
        return self._unavailable("No decoder of images is running; the service's log says why.")

    async def close(self) -> None:
        """End the processes; whatever still waits for one fails."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        error = self._unavailable("The service stopped before this was done.")
        self._fail_waiting(error)
        for link in self._decoders:
            for job in link.jobs:
                job.fail(error)
            link.disconnect()
        await asyncio.gather(*(asyncio.to_thread(link.end) for link in self._decoders))

    async def _judge(self, parts: Sequence[ImagePart], rules: ImageRules) -> list[int]:
        if len(parts) > _MANY_PARTS:
            return await asyncio.to_thread(self._room.judge, parts, rules)
        return self._room.judge(parts, rules)

    def _unavailable(self, detail: str) -> UnavailableError:
        return UnavailableError(detail, {"Retry-After": str(self._limits.retry_after_s)})

    async def _add(self, pause_s: float = 0.0) -> None:
        """Start a process after a pause; one that cannot be started is tried again."""
        await asyncio.sleep(pause_s)
        self._assign()
        try:
            link = DecoderLink(_MODULE, self._answered, self._lost)
        except OSError as exc:
            self._start_failed(f"no decoder could be started: {exc}")
            return
        self._decoders.append(link)
        self._metrics.decoders.set(len(self._decoders))
        await link.connect()

    def _start_failed(self, reason: str) -> None:
        self._num_failed_starts += 1
        self._begun.set()
        pause_s = min(_FIRST_PAUSE_S * 2.0 ** min(self._num_failed_starts, 10), _LONGEST_PAUSE_S)
        logger.error("%s; the next attempt is in %.3g s", reason, pause_s)
        if self._has_given_up():
            self._fail_waiting(self.unavailable())
        self._keep(self._add(pause_s))

    def _has_given_up(self) -> bool:
        return self._num_failed_starts >= _MAX_FAILED_STARTS and not any(
            link.ready for link in self._decoders
        )

    def _fail_waiting(self, error: UnavailableError) -> None:
        for request in self._waiting:
            for job in list(request.waiting):
                job.fail(error)

    def _keep(self, coroutine: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _assign(self) -> None:
        """Give the decoders images while they have room, one of each request in turn."""
        while any(link.has_room for link in self._decoders) and self._assign_next():
            pass

    def _assign_next(self) -> bool:
        """Give an image of the first request that has a fitting one to a decoder; whether there was one."""
        for request in list(self._waiting):
            if not request.waiting:
                del self._waiting[request]
            elif link := self._link_for(request.waiting[0]):
                self._waiting.move_to_end(request)
                link.send(request.waiting.popleft())
                return True
        return False

    def _link_for(self, job: Job) -> DecoderLink | None:
        """The decoder with least to do that takes this; of several, one is kept from large images."""
        if job.is_large:
            num_busy = sum(any(other.is_large for other in link.jobs) for link in self._decoders)
            if num_busy >= max(1, sum(link.ready for link in self._decoders) - 1):
                return None
        usable = [link for link in self._decoders if link.takes(job)]
        return min(usable, key=lambda link: len(link.jobs), default=None)

    def _withdraw(self, request: ImageRequest, jobs: Sequence[Job]) -> None:
        """A request has ended: nothing of it is begun or kept, and no decoder goes on with a large image."""
        self._waiting.pop(request, None)
        request.waiting.clear()
        for job in jobs:
            job.future.cancel()
            job.part = job.part._replace(data=b"")
        for link in self._decoders:
            first = link.jobs[0] if link.jobs else None
            if first and first.future.cancelled() and (first.is_large or link.is_behind):
                link.discarded = True
                link.kill()

    def _answered(self, jobs: list[Job]) -> None:
        self._num_failed_starts = 0
        self._begun.set()
        for job in jobs:
            self._room.record(job.num_pixels, job.duration_s)
            self._metrics.decoder_busy_seconds.inc(job.duration_s)
            job.request.is_slow |= job.duration_s > _SLOW_S
        self._assign()

    def _lost(self, link: DecoderLink) -> None:
        """A decoder has ended: start another, and try its images again."""
        if self._closed:
            return
        self._decoders.remove(link)
        self._metrics.decoders.set(len(self._decoders))
        for other in self._decoders:
            other.check_alive()
        status = link.status()
        if not link.discarded:
            self._metrics.decoder_failures.inc()
        if not link.ready:
            self._start_failed(f"a decoder ended with status {status} before it was ready")
            return
        if not link.discarded:
            logger.error("a decoder ended with status %s and is started again", status)
            if link.jobs:
                self._blame(link.jobs[0], status)
        for job in reversed(link.jobs):
            if not job.future.done():
                self._put_back(job)
        # The pause comes before the next attempt: others that were ended together with it are known by then.
        self._keep(self._add(_FIRST_PAUSE_S))

    def _blame(self, job: Job, status: int) -> None:
        """Judge the image that a decoder ended with: by its CPU time, by its own crash, or not at all."""
        job.attempts += 1
        name = job.part.name
        if status == -CPU_SIGNAL:
            job.fail(TooLargeError(f"{name} takes more time to decode than a picture of its size may take"))
        elif job.attempts < MAX_ATTEMPTS:
            return
        elif status == -signal.SIGKILL:  # by the system, or by us: it was stopped, or starved
            job.fail(self._unavailable(f"{name} could not be decoded: the decoders that had it were ended"))
        else:
            job.fail(MalformedError(f"{name} brought its decoder down, and is taken for damaged"))

    def _put_back(self, job: Job) -> None:
        """Let a job be the next."""
        job.request.waiting.appendleft(job)
        self._waiting[job.request] = None
        self._waiting.move_to_end(job.request, last=False)

    async def _watch(self) -> None:
        """Replace decoders that make no progress. Their images are tried again, or fail."""
        while True:
            await asyncio.sleep(max(self._timeout_s / _CHECKS_PER_TIMEOUT, _LEAST_CHECK_S))
            for link in list(self._decoders):
                if not link.check_progress():
                    logger.error("a decoder made no progress for %g s and is replaced", self._timeout_s)
                    link.kill()
