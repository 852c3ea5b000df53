"""The client for asyncio."""

import asyncio
import ssl
from collections.abc import AsyncGenerator, AsyncIterable, Callable, Iterable
from functools import partial
from types import TracebackType
from typing import Literal, Self, TypeVar, Unpack, overload

import httpx

from drorae_client.attempts import (
    READY_TIMEOUT_S,
    Build,
    Compute,
    EncodeBatch,
    Outcome,
    Pauses,
    Procedure,
    Send,
    Service,
    Sleep,
    ask_ready,
    encode_batch,
    perform,
)
from drorae_client.connections import DEFAULT_TIMEOUT_S, DEFAULT_URL, Connections
from drorae_client.errors import DroraeError
from drorae_client.many.plan import OnError, Plan
from drorae_client.many.window import Window
from drorae_client.many.workers import raise_it
from drorae_client.wire import calls
from drorae_client.wire.calls import Answer
from drorae_client.wire.inputs import ImageInput, ImagesInput, LatentsInput, async_batches, check_several
from drorae_client.wire.results import Info, Latents, Pictures

T = TypeVar("T")
Images = Iterable[ImageInput] | AsyncIterable[ImageInput]


class AsyncClient:
    """A DRoRAE service, for asyncio. It has the methods of `Client`; files and arrays are read in threads.

    Args:
        url: of the service.
        api_key: where the service wants one.
        timeout: seconds for a call, over all its attempts.
        tls: for ``https`` with certificates of one's own.

    Raises:
        InputError: an impossible address or key.
    """

    def __init__(
        self,
        url: str = DEFAULT_URL,
        *,
        api_key: str | None = None,
        timeout: float = DEFAULT_TIMEOUT_S,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        self._connections = Connections(httpx.AsyncClient, url, api_key, tls)
        self._service = Service(self._connections.url)
        self._timeout_s = timeout

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._service.url!r})"

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close all connections; those in use are closed when their request ends."""
        for http in self._connections.close():
            await http.aclose()

    async def encode(
        self, images: ImagesInput, *, timeout: float | None = None, **options: Unpack[calls.EncodeOptions]
    ) -> Latents:
        """As `Client.encode`."""
        return await self._call(partial(calls.encode_call, images, **options), timeout)

    async def decode(
        self, latents: LatentsInput, *, timeout: float | None = None, **options: Unpack[calls.DecodeOptions]
    ) -> Pictures:
        """As `Client.decode`."""
        return await self._call(partial(calls.decode_call, latents, **options), timeout)

    async def reconstruct(
        self,
        images: ImagesInput,
        *,
        timeout: float | None = None,
        **options: Unpack[calls.ReconstructOptions],
    ) -> Pictures:
        """As `Client.reconstruct`."""
        return await self._call(partial(calls.reconstruct_call, images, **options), timeout)

    async def info(self, *, timeout: float | None = None) -> Info:
        """As `Client.info`."""
        return await self._call(calls.info_call, timeout)

    async def ready(self, *, timeout: float = READY_TIMEOUT_S) -> bool:
        """Whether the service takes work, by one attempt; False where nothing answers."""
        return await self._run(ask_ready(timeout))

    @overload
    def encode_many(
        self,
        images: Images,
        *,
        batch: int = ...,
        concurrency: int = ...,
        on_error: Literal["raise"] = ...,
        progress: bool = ...,
        timeout: float | None = ...,
        **options: Unpack[calls.EncodeOptions],
    ) -> AsyncGenerator[Latents, None]: ...

    @overload
    def encode_many(
        self,
        images: Images,
        *,
        batch: int = ...,
        concurrency: int = ...,
        on_error: OnError,
        progress: bool = ...,
        timeout: float | None = ...,
        **options: Unpack[calls.EncodeOptions],
    ) -> AsyncGenerator[Latents | DroraeError, None]: ...

    def encode_many(
        self,
        images: Images,
        *,
        batch: int = 8,
        concurrency: int = 8,
        on_error: OnError = "raise",
        progress: bool = False,
        timeout: float | None = None,
        **options: Unpack[calls.EncodeOptions],
    ) -> AsyncGenerator[Latents | DroraeError, None]:
        """As `Client.encode_many`; the images may come from an asynchronous iterable too.

        Leave it early inside ``contextlib.aclosing``, which cancels what is under way at once.
        """
        check_several(images)
        plan = Plan(batch, concurrency, on_error, progress)
        timeout_s = self._timeout_s if timeout is None else timeout
        encode = partial(encode_batch, self._service, options=dict(options), timeout_s=timeout_s)
        return self._many(images, encode, plan)

    async def _many(
        self, images: Images, encode: EncodeBatch, plan: Plan
    ) -> AsyncGenerator[Latents | DroraeError, None]:
        window: Window[list[Latents | DroraeError]] = Window(plan.concurrency)
        reports: asyncio.Queue[Callable[[], None]] = asyncio.Queue()
        remaining = async_batches(images, plan.batch)
        num_given = 0

        async def work(number: int, some: list[ImageInput]) -> None:
            pauses = Pauses(
                lambda refused: reports.put_nowait(partial(window.pause, number, refused)),
                partial(reports.put_nowait, window.resume),
            )
            try:
                results = await self._run(encode(some, pauses=pauses))
                reports.put_nowait(partial(window.finish, number, results))
            except Exception as exc:  # a worker's boundary: the consumer raises it
                reports.put_nowait(partial(raise_it, exc))

        with plan.bar(images) as bar:
            tasks: set[asyncio.Task[None]] = set()
            try:
                while True:
                    some = await anext(remaining, None) if window.is_open else None
                    if some is not None:
                        task = asyncio.create_task(work(window.begin(), some))
                        tasks.add(task)
                        task.add_done_callback(tasks.discard)
                    if window.has_next:
                        for result in plan.checked(window.take(), num_given):
                            num_given += 1
                            bar.update()
                            yield result
                    elif window.is_empty:
                        return
                    elif some is None:
                        (await reports.get())()
                    while not reports.empty():
                        reports.get_nowait()()
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    async def _call(self, build: Build[T], timeout: float | None) -> T:
        return await self._run(perform(self._service, build, self._timeout_s if timeout is None else timeout))

    async def _run(self, procedure: Procedure[T]) -> T:
        """Do what a procedure says, until it ends."""
        outcome: object = None
        while True:
            try:
                step = procedure.send(outcome)
            except StopIteration as end:
                result: T = end.value
                return result
            match step:
                case Compute(function):
                    outcome = await asyncio.to_thread(function)
                case Sleep(seconds):
                    await asyncio.sleep(seconds)
                    outcome = None
                case Send():
                    outcome = await self._send(step)

    async def _send(self, send: Send) -> Outcome:
        http = self._connections.borrow(asyncio.get_running_loop())
        try:
            async with (
                asyncio.timeout(send.timeout_s),
                http.stream(**self._connections.request(send)) as response,
            ):
                body = await response.aread()
            return Answer(response.status_code, response.headers, body)
        except httpx.TransportError as exc:
            return exc
        except TimeoutError:
            return httpx.ReadTimeout("the answer came too slowly")
        finally:
            if not self._connections.keep(http):
                await http.aclose()
