"""The client for ordinary code, which waits for answers."""

import ssl
import time
from collections.abc import Iterable, Iterator
from functools import partial
from threading import Event
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
from drorae_client.many.workers import StoppedError, Workers
from drorae_client.wire import calls
from drorae_client.wire.calls import Answer
from drorae_client.wire.inputs import ImageInput, ImagesInput, LatentsInput, batches, check_several
from drorae_client.wire.results import Info, Latents, Pictures

T = TypeVar("T")


class Client:
    """A DRoRAE service. Threads may share one client; so may processes that are forked.

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
        self._connections = Connections(httpx.Client, url, api_key, tls)
        self._service = Service(self._connections.url)
        self._timeout_s = timeout

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self._service.url!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close all connections; those in use are closed when their request ends."""
        for http in self._connections.close():
            http.close()

    def encode(
        self, images: ImagesInput, *, timeout: float | None = None, **options: Unpack[calls.EncodeOptions]
    ) -> Latents:
        """Images to latents [N, C, h, w].

        Args:
            images: a path, bytes, a PIL image or an array, or a list of them.
            timeout: seconds, instead of the client's.
            options: see `calls.EncodeOptions`.

        Raises:
            DroraeError: see `drorae_client.errors`.
        """
        return self._call(partial(calls.encode_call, images, **options), timeout)

    def decode(
        self, latents: LatentsInput, *, timeout: float | None = None, **options: Unpack[calls.DecodeOptions]
    ) -> Pictures:
        """Latents to pictures.

        Args:
            latents: `Latents`, a path or the bytes of a file of latents, or an array.
            timeout: seconds, instead of the client's.
            options: see `calls.DecodeOptions`.

        Raises:
            DroraeError: see `drorae_client.errors`.
        """
        return self._call(partial(calls.decode_call, latents, **options), timeout)

    def reconstruct(
        self,
        images: ImagesInput,
        *,
        timeout: float | None = None,
        **options: Unpack[calls.ReconstructOptions],
    ) -> Pictures:
        """Images to latents and back.

        Args:
            images: as for `encode`.
            timeout: seconds, instead of the client's.
            options: see `calls.ReconstructOptions`.

        Raises:
            DroraeError: see `drorae_client.errors`.
        """
        return self._call(partial(calls.reconstruct_call, images, **options), timeout)

    def info(self, *, timeout: float | None = None) -> Info:
        """What runs at the service.

        Raises:
            DroraeError: see `drorae_client.errors`.
        """
        return self._call(calls.info_call, timeout)

    def ready(self, *, timeout: float = READY_TIMEOUT_S) -> bool:
        """Whether the service takes work, by one attempt; False where nothing answers."""
        return self._run(ask_ready(timeout))

    @overload
    def encode_many(
        self,
        images: Iterable[ImageInput],
        *,
        batch: int = ...,
        concurrency: int = ...,
        on_error: Literal["raise"] = ...,
        progress: bool = ...,
        timeout: float | None = ...,
        **options: Unpack[calls.EncodeOptions],
    ) -> Iterator[Latents]: ...

    @overload
    def encode_many(
        self,
        images: Iterable[ImageInput],
        *,
        batch: int = ...,
        concurrency: int = ...,
        on_error: OnError,
        progress: bool = ...,
        timeout: float | None = ...,
        **options: Unpack[calls.EncodeOptions],
    ) -> Iterator[Latents | DroraeError]: ...

    def encode_many(
        self,
        images: Iterable[ImageInput],
        *,
        batch: int = 8,
        concurrency: int = 8,
        on_error: OnError = "raise",
        progress: bool = False,
        timeout: float | None = None,
        **options: Unpack[calls.EncodeOptions],
    ) -> Iterator[Latents | DroraeError]:
        """Latents [1, C, h, w] of every image, in the order of the images, while others are under way.

        Images are read from the iterable as they are needed: at most ``2 * batch * concurrency`` are held,
        or their latents. Where the service has no room, fewer requests are sent at once.

        Args:
            images: single images, as for `encode`.
            batch: most images per request.
            concurrency: most requests at once.
            on_error: ``raise`` ends at the first image that fails; ``return`` gives its error in its place.
            progress: shows a bar on standard error.
            timeout: seconds per request, over all its attempts, instead of the client's.
            options: see `calls.EncodeOptions`.

        Raises:
            DroraeError: see `drorae_client.errors`. Those that are about no image, such as a wrong key, are
                always raised.
        """
        check_several(images)
        plan = Plan(batch, concurrency, on_error, progress)
        timeout_s = self._timeout_s if timeout is None else timeout
        encode = partial(encode_batch, self._service, options=dict(options), timeout_s=timeout_s)
        return self._many(images, encode, plan)

    def _many(
        self, images: Iterable[ImageInput], encode: EncodeBatch, plan: Plan
    ) -> Iterator[Latents | DroraeError]:
        window: Window[list[Latents | DroraeError]] = Window(plan.concurrency)
        remaining = batches(images, plan.batch)
        num_given = 0

        def work(number: int, some: list[ImageInput]) -> None:
            pauses = Pauses(
                lambda refused: workers.report(partial(window.pause, number, refused)),
                partial(workers.report, window.resume),
            )
            results = self._run(encode(some, pauses=pauses), workers.stop)
            workers.report(partial(window.finish, number, results))

        with Workers(work, plan.concurrency) as workers, plan.bar(images) as bar:
            while True:
                workers.hear()
                some = next(remaining, None) if window.is_open else None
                if some is not None:
                    workers.begin(window.begin(), some)
                if window.has_next:
                    for result in plan.checked(window.take(), num_given):
                        num_given += 1
                        bar.update()
                        yield result
                elif window.is_empty:
                    return
                elif some is None:
                    workers.wait()

    def _call(self, build: Build[T], timeout: float | None) -> T:
        return self._run(perform(self._service, build, self._timeout_s if timeout is None else timeout))

    def _run(self, procedure: Procedure[T], stop: Event | None = None) -> T:
        """Do what a procedure says, until it ends, or until it is told to stop."""
        stop = stop or Event()
        outcome: object = None
        while not stop.is_set():
            try:
                step = procedure.send(outcome)
            except StopIteration as end:
                result: T = end.value
                return result
            match step:
                case Compute(function):
                    outcome = function()
                case Sleep(seconds):
                    outcome = stop.wait(seconds)
                case Send():
                    outcome = self._send(step)
        raise StoppedError

    def _send(self, send: Send) -> Outcome:
        end_s = time.monotonic() + send.timeout_s
        http = self._connections.borrow()
        try:
            with http.stream(**self._connections.request(send)) as response:
                chunks = []
                for chunk in response.iter_raw():
                    chunks.append(chunk)
                    if time.monotonic() > end_s:
                        raise httpx.ReadTimeout("the answer came too slowly")
            return Answer(response.status_code, response.headers, b"".join(chunks))
        except httpx.TransportError as exc:
            return exc
        finally:
            if not self._connections.keep(http):
                http.close()
