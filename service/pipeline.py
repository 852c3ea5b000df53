"""What every route does with a request: admit it, read it, put its items through the engine.

Only waiting happens on the event loop. Images are decoded and answers written in a pool of
threads; the model runs in the engine's own.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import ParamSpec, TypeVar

import torch
from fastapi import Request
from torch import Tensor

from service.batching import BatchKey, Item
from service.bodies import media_type_of, read_body
from service.context import RequestContext
from service.engine import Engine
from service.errors import DeadlineError, LatentsError, MalformedError
from service.metrics import Metrics
from service.payloads import Payload
from service.settings import Settings

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class Pipeline:
    """The parts of one application, kept in ``app.state.pipeline``."""

    def __init__(self, settings: Settings, engine: Engine, metrics: Metrics) -> None:
        self.settings = settings
        self.engine = engine
        self.metrics = metrics
        self._io_threads = ThreadPoolExecutor(settings.num_io_threads, thread_name_prefix="drorae-io")

    def close(self) -> None:
        """Stop the threads once nothing uses them."""
        self._io_threads.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def deadline(self, context: RequestContext) -> AsyncIterator[None]:
        """Cut the block off at the request's deadline.

        Raises:
            DeadlineError: time was up.
        """
        try:
            async with asyncio.timeout(context.deadline_s - time.monotonic()):
                yield
        except TimeoutError as exc:
            raise DeadlineError(
                f"The request was not done within {self.settings.request_timeout_s:g} s."
            ) from exc

    async def read(self, request: Request, context: RequestContext) -> Payload:
        """The body, bounded, with what its headers say of it.

        Raises:
            ServiceError: empty, too large, compressed.
        """
        media_type, parameters = media_type_of(request)
        with context.measure("read"):
            body = await read_body(request, self.settings.max_body_bytes)
        return Payload(body, media_type, parameters.get(b"boundary"))

    async def in_thread(
        self, function: Callable[Parameters, Result], *args: Parameters.args, **kwargs: Parameters.kwargs
    ) -> Result:
        """Run a function in the pool."""
        call = self._io_threads.submit(function, *args, **kwargs)
        return await asyncio.wrap_future(call)

    async def compute(
        self, request: Request, context: RequestContext, key: BatchKey, inputs: Sequence[Tensor]
    ) -> Tensor:
        """Put inputs [...] through the engine; [N, ...] float32 comes back, in order.

        Raises:
            ServiceError: queue full, deadline passed, an item that the model refuses, or a client
                that went away; items that the model has not begun are taken back then.
        """
        with context.measure("model"):
            items = [Item(key, tensor) for tensor in inputs]
            futures = self.engine.submit(items, context.deadline_s)
            results = asyncio.ensure_future(_gather(futures))
            gone = asyncio.ensure_future(_wait_for_disconnect(request))
            try:
                await asyncio.wait((results, gone), return_when=asyncio.FIRST_COMPLETED)
                if not results.done():
                    raise MalformedError("The client went away before the answer was ready.")
                return torch.stack(results.result())
            finally:
                gone.cancel()
                results.cancel()
                for future in futures:
                    future.cancel()


async def _gather(futures: Sequence[Future[Tensor]]) -> list[Tensor]:
    results = []
    for index, future in enumerate(futures):
        try:
            results.append(await asyncio.wrap_future(future))
        except LatentsError as exc:
            raise LatentsError(f"Item {index}: {exc.detail}") from exc
    return results


async def _wait_for_disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
