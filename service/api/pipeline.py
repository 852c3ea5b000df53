"""What every route does with a request: admit it, read it, put its items through the engine, answer.

Only waiting happens on the event loop. Image files are decoded in processes, tensors read and answers
written in a pool of threads; the model runs in the engine's own.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import ParamSpec, TypeVar

import torch
from fastapi import Request, Response
from prometheus_client import Histogram
from torch import Tensor

from model.process import num_cpus
from model.tokenizer import Tokenizer
from service.api.admission import Admission, Reservation
from service.codecs.bodies import BodyLimits, check_declared, media_type_of, read_body
from service.codecs.requests import Payload
from service.codecs.responses import writing_bytes
from service.engine.devices import share_cpus
from service.engine.engine import Engine, EngineState
from service.engine.operations import BatchKey, Operation
from service.engine.queue import Job
from service.errors import DeadlineError, DisconnectError, UnavailableError
from service.photos.decode import ImagePart, ImageRules
from service.photos.pool import Decoders
from service.photos.room import PixelLimits
from service.settings import Settings
from service.telemetry.context import RequestContext
from service.telemetry.metrics import Metrics

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Pipeline:
    """The parts of one application, kept in ``app.state.pipeline``."""

    def __init__(self, settings: Settings, engine: Engine, metrics: Metrics) -> None:
        self.settings = settings
        self.engine = engine
        self.metrics = metrics
        self.admission = Admission(settings, engine, metrics)
        limits = PixelLimits(settings.max_request_pixels, settings.queue_limit_pixels, settings.retry_after_s)
        self.decoders = Decoders(share_cpus(settings).num_decoders, settings.hang_timeout_s, metrics, limits)
        metrics.ready.set_function(self.is_ready)
        self._io_threads = ThreadPoolExecutor(
            settings.num_io_threads or num_cpus(),
            thread_name_prefix="drorae-io",
            initializer=torch.set_num_threads,  # the cores are the model's
            initargs=(1,),
        )

    async def close(self) -> None:
        """Stop decoders and threads once nothing uses them."""
        await self.decoders.close()
        self._io_threads.shutdown(wait=False, cancel_futures=True)

    async def in_thread(self, place: Reservation, function: Callable[[], Result]) -> Result:
        """Run a function in the pool; one that has not begun when the request ends never does.

        One that has begun goes on, and the request's bytes are held until it is done.
        """
        work = self._io_threads.submit(function)
        try:
            return await asyncio.wrap_future(work)
        finally:
            if not work.done():
                place.keep_until_done(work)

    def is_ready(self) -> bool:
        """Whether every kind of work is taken now."""
        return self.engine.state is EngineState.READY and self.decoders.is_ready

    def check_ready(self) -> None:
        """Refuse to be called ready.

        Raises:
            UnavailableError: the engine is not ready, or no decoder answers.
        """
        self.engine.check_ready()
        if not self.decoders.is_ready:
            raise self.decoders.unavailable()

    def ready_tokenizer(self) -> Tokenizer:
        """The tokenizer, if work is taken now.

        Raises:
            UnavailableError: it is not.
        """
        self.engine.check_ready()
        return self.engine.tokenizer

    @asynccontextmanager
    async def admit(self, request: Request, operation: Operation, num_items: int) -> AsyncIterator["Call"]:
        """Give a request its place until its answer is sent, its time is up, or its client goes away.

        Args:
            request: its headers are there, its body is not read yet.
            operation: what its items need.
            num_items: how many they are, as far as the headers tell; `Call.expect` corrects it.

        Raises:
            ServiceError: no room, no time left, the client went away, or a body that cannot be read.
        """
        context: RequestContext = request.state.context
        check_declared(request, self.settings.max_body_bytes)
        place = context.resources.enter_context(
            self.admission.admit(operation, num_items, context.deadline_s)
        )
        call = Call(self, request, context, place, num_items)
        try:
            async with asyncio.timeout(context.deadline_s - time.monotonic()):
                yield call
        except TimeoutError as exc:
            seconds = context.deadline_s - context.started_s
            raise DeadlineError(f"The request was not done within {seconds:.3g} s.") from exc
        except DisconnectError:
            self.metrics.disconnects.inc()
            raise
        except asyncio.CancelledError:
            if not call.abandoned:
                raise
            task = asyncio.current_task()
            assert task is not None
            task.uncancel()
            self.metrics.disconnects.inc()
            raise DisconnectError("The client went away before its answer was ready.") from None
        finally:
            call.close()


class Call:
    """One admitted request on its way through the service.

    Attributes:
        abandoned: whether its client went away.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        request: Request,
        context: RequestContext,
        place: Reservation,
        num_items: int,
    ) -> None:
        self.abandoned = False
        self.settings = pipeline.settings
        self._pipeline = pipeline
        self._request = request
        self._context = context
        self._place = place
        self._num_items = num_items
        self._route: str = request.scope["path"]
        self._watcher: asyncio.Task[None] | None = None

    async def read(self) -> Payload:
        """The body, bounded, with what its headers say of it; from then on the client is watched.

        Raises:
            ServiceError: empty, too large, too slow, incomplete, or no room for it.
        """
        media_type, parameters = media_type_of(self._request)
        limits = BodyLimits(
            self.settings.max_body_bytes, self.settings.body_timeout_s, self.settings.body_bytes_per_s
        )
        with self._context.measure("read"):
            body = await read_body(self._request, limits, self._place.hold_bytes)
        self._place.hold_items(self._num_items)
        self._watcher = asyncio.create_task(self._watch(asyncio.current_task()))
        return Payload(body, media_type, parameters.get(b"boundary"))

    def hold(self, num_bytes: int) -> None:
        """Reserve the memory that the request takes now, in place of what it took before.

        Raises:
            QueueFullError: there is not so much.
        """
        self._place.hold_bytes(num_bytes)

    def expect(self, num_items: int) -> None:
        """Reserve room for the items that the body turned out to have.

        Raises:
            QueueFullError: there is none.
        """
        self._place.hold_items(num_items)

    async def in_thread(
        self, function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        """Run a function of the body in the pool of threads, timed as decoding."""
        with self._timed("decode", self._pipeline.metrics.body_decode_seconds):
            return await self._pipeline.in_thread(self._place, partial(function, *args, **kwargs))

    async def decode_images(self, parts: Sequence[ImagePart], rules: ImageRules) -> list[Tensor]:
        """Image files to tensors, each [3, S, S] uint8.

        Raises:
            ServiceError: one cannot be read, and the sentence names it; or no room for the pixels.
        """
        pixel_bytes = len(parts) * 3 * rules.side**2
        self._place.hold_bytes(sum(len(part.data) for part in parts) + pixel_bytes)
        with self._timed("decode", self._pipeline.metrics.body_decode_seconds):
            return await self._pipeline.decoders.decode(parts, rules, self._context.deadline_s)

    async def compute(self, key: BatchKey, inputs: Sequence[Tensor], media_type: str) -> Tensor:
        """Put inputs through the engine; [N, ...] float32 comes back, in order.

        The body is no longer needed then. What is needed until the answer is sent is held from here on, so
        that nothing is computed for which there is no room.

        Args:
            key: what is done.
            inputs: on the CPU.
            media_type: of the answer.

        Raises:
            ServiceError: no room, the engine stopped, or an item that the model refuses; items that no
                device has begun are taken back.
        """
        engine = self._pipeline.engine
        operation = key.operation
        result_bytes = len(inputs) * operation.result_bytes(engine.tokenizer)
        input_bytes = sum(tensor.nbytes for tensor in inputs)
        kept_bytes = 0 if operation.gives == "latents" else input_bytes
        self._place.hold_bytes(
            result_bytes
            + max(
                input_bytes + result_bytes,  # the batches that results came in
                kept_bytes + writing_bytes(operation.gives, media_type, result_bytes),
            )
        )
        job = Job(key, inputs, self._context.deadline_s)
        engine.submit(job)
        try:
            results = await asyncio.wrap_future(job.future)
        except BaseException as exc:
            expired = isinstance(exc, asyncio.CancelledError) and not self.abandoned
            outcome = "expired" if expired else "cancelled"
            engine.cancel(job, UnavailableError("Nobody waits for it."), outcome)
            raise
        finally:
            job.release()
        times = job.times
        self._context.record("queue", times.enqueued_s, times.taken_s)
        self._context.record("batch", times.taken_s, times.started_s)
        self._context.record("device", times.started_s, times.finished_s)
        return results

    async def answer(self, write: Callable[[], Response], is_quick: bool = False) -> Response:
        """Write the answer: in the pool, or here where that is quicker than a thread is asked."""
        with self._timed("encode", self._pipeline.metrics.answer_encode_seconds):
            response = write() if is_quick else await self._pipeline.in_thread(self._place, write)
        self._place.hold_bytes(len(response.body))
        return response

    @contextmanager
    def _timed(self, stage: str, histogram: Histogram) -> Iterator[None]:
        """Time the block as a stage of the request, and in a histogram by route."""
        started_s = time.monotonic()
        try:
            yield
        finally:
            ended_s = time.monotonic()
            self._context.record(stage, started_s, ended_s)
            histogram.labels(self._route).observe(ended_s - started_s)

    def close(self) -> None:
        """Stop watching the client; no item of it is left to be answered."""
        self._place.hold_items(0)
        if self._watcher is not None:
            self._watcher.cancel()

    async def _watch(self, task: "asyncio.Task[None] | None") -> None:
        """Cancel the request's own task once its client has gone."""
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self.abandoned = True
        if task is not None:
            task.cancel()
