"""What every route does with a request: admit it, read it, put its items through the engine, answer.

Only waiting happens on the event loop. Images are decoded and answers written in a pool of threads;
the model runs in the engine's own.
"""

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from typing import ParamSpec, TypeVar

import torch
from fastapi import Request, Response
from torch import Tensor

from model.tokenizer import Tokenizer
from service.admission import Admission, Reservation
from service.batching import BatchKey, Job, Operation
from service.bodies import declared_bytes, media_type_of, read_body
from service.context import RequestContext
from service.engine import Engine
from service.errors import DeadlineError, DisconnectError, UnavailableError
from service.metrics import Metrics
from service.payloads import Payload
from service.settings import Settings

Parameters = ParamSpec("Parameters")
Part = TypeVar("Part")
Result = TypeVar("Result")


class Pipeline:
    """The parts of one application, kept in ``app.state.pipeline``."""

    def __init__(self, settings: Settings, engine: Engine, metrics: Metrics) -> None:
        self.settings = settings
        self.engine = engine
        self.metrics = metrics
        self.admission = Admission(settings, engine, metrics)
        self.num_io_threads = settings.num_io_threads or len(os.sched_getaffinity(0))
        self.io_threads = ThreadPoolExecutor(
            self.num_io_threads,
            thread_name_prefix="drorae-io",
            initializer=torch.set_num_threads,  # the cores are the model's
            initargs=(1,),
        )

    def close(self) -> None:
        """Stop the threads once nothing uses them."""
        self.io_threads.shutdown(wait=False, cancel_futures=True)

    def ready_tokenizer(self) -> Tokenizer:
        """The tokenizer, if work is taken now.

        Raises:
            UnavailableError: it is not.
        """
        self.engine.check_ready()
        return self.engine.tokenizer

    @asynccontextmanager
    async def admit(self, request: Request, operation: Operation, num_items: int) -> AsyncIterator["Call"]:
        """Reserve a request's place until it is answered, its time is up, or its client goes away.

        Args:
            request: its headers are there, its body is not read yet.
            operation: what its items need.
            num_items: how many they are, as far as the headers tell; `Call.expect` corrects it.

        Raises:
            ServiceError: no room, no time left, the client went away, or a body that cannot be read.
        """
        context: RequestContext = request.state.context
        num_bytes = declared_bytes(request, self.settings.max_body_bytes)
        with self.admission.reserve(operation, num_items, num_bytes, context.deadline_s) as place:
            call = Call(self, request, context, place)
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
        self, pipeline: Pipeline, request: Request, context: RequestContext, place: Reservation
    ) -> None:
        self.abandoned = False
        self.settings = pipeline.settings
        self._pipeline = pipeline
        self._request = request
        self._context = context
        self._place = place
        self._route = request.url.path
        self._watcher: asyncio.Task[None] | None = None

    async def read(self) -> Payload:
        """The body, bounded, with what its headers say of it; from then on the client is watched.

        Raises:
            ServiceError: empty, too large, compressed, or incomplete.
        """
        media_type, parameters = media_type_of(self._request)
        with self._context.measure("read"):
            body = await read_body(self._request, self.settings.max_body_bytes)
        self._place.resize_bytes(len(body))
        self._watcher = asyncio.create_task(self._watch(asyncio.current_task()))
        return Payload(body, media_type, parameters.get(b"boundary"))

    def expect(self, num_items: int) -> None:
        """Reserve room for the items that the body turned out to have.

        Raises:
            QueueFullError: there is none.
        """
        self._place.resize_items(num_items)

    @contextmanager
    def decoding(self) -> Iterator[None]:
        """Time the block as the decoding of the body."""
        started_s = time.monotonic()
        try:
            yield
        finally:
            ended_s = time.monotonic()
            self._context.record("decode", started_s, ended_s)
            self._pipeline.metrics.body_decode_seconds.labels(self._route).observe(ended_s - started_s)

    async def in_thread(
        self, function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        """Run a function in the pool; one that has not begun when the request ends never does."""
        return await asyncio.wrap_future(self._pipeline.io_threads.submit(function, *args, **kwargs))

    async def in_threads(
        self, function: Callable[[Sequence[Part]], list[Result]], parts: Sequence[Part]
    ) -> list[Result]:
        """Run a function on shares of ``parts``, as many at a time as the pool has threads.

        Args:
            function: turns some parts into as many results.
            parts: all of them.
        """
        share = -(-len(parts) // self._pipeline.num_io_threads)
        shares = [parts[start : start + share] for start in range(0, len(parts), share)]
        calls = [self._pipeline.io_threads.submit(function, some) for some in shares]
        try:
            return [result for call in calls for result in await asyncio.wrap_future(call)]
        finally:
            for call in calls:
                call.cancel()

    async def compute(self, key: BatchKey, inputs: Sequence[Tensor]) -> Tensor:
        """Put inputs through the engine; [N, ...] float32 comes back, in order.

        The body is no longer needed then, and its bytes make room for others.

        Raises:
            ServiceError: the engine stopped, or an item that the model refuses; items that no device has
                begun are taken back.
        """
        self._place.resize_bytes(0)
        job = Job(key, inputs, self._context.deadline_s)
        engine = self._pipeline.engine
        engine.submit(job)
        try:
            results = await asyncio.wrap_future(job.future)
        except BaseException as exc:
            expired = isinstance(exc, asyncio.CancelledError) and not self.abandoned
            outcome = "expired" if expired else "cancelled"
            engine.cancel(job, UnavailableError("Nobody waits for it."), outcome)
            raise
        times = job.times
        self._context.record("queue", times.enqueued_s, times.taken_s)
        self._context.record("batch", times.taken_s, times.started_s)
        self._context.record("device", times.started_s, times.finished_s)
        return results

    async def answer(self, write: Callable[[], Response], is_quick: bool = False) -> Response:
        """Write the answer: in the pool, or here where that is quicker than a thread is asked."""
        started_s = time.monotonic()
        response = write() if is_quick else await self.in_thread(write)
        ended_s = time.monotonic()
        self._context.record("encode", started_s, ended_s)
        self._pipeline.metrics.answer_encode_seconds.labels(self._route).observe(ended_s - started_s)
        return response

    def close(self) -> None:
        """Stop watching the client."""
        if self._watcher is not None:
            self._watcher.cancel()

    async def _watch(self, task: "asyncio.Task[None] | None") -> None:
        """Cancel the request's own task once its client has gone."""
        while (await self._request.receive())["type"] != "http.disconnect":
            pass
        self.abandoned = True
        if task is not None:
            task.cancel()
