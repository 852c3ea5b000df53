"""The parts of one application, which its routes share."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch
from starlette.requests import Request

from model.process import num_cpus
from service.api.admission import Admission, Reservation
from service.api.view import EngineView
from service.codecs.facts import ModelFacts
from service.engine.devices import share_cpus
from service.engine.state import EngineState
from service.photos.pool import Decoders
from service.photos.room import PixelLimits
from service.processes.tally import Tally
from service.settings import Settings
from service.telemetry.metrics import Metrics

Result = TypeVar("Result")


class Parts:
    """The parts of one application, kept in ``app.state.parts``.

    Only waiting happens on the event loop: image files are decoded in processes, tensors are read and answers
    written in a pool of threads, and the model runs in the engine's own threads.
    """

    def __init__(
        self, settings: Settings, engine: EngineView, metrics: Metrics, tally: Tally | None = None
    ) -> None:
        self.settings = settings
        self.engine = engine
        self.metrics = metrics
        tally = tally or Tally()
        self.admission = Admission(settings, engine, metrics, tally)
        limits = PixelLimits(settings.max_request_pixels, settings.queue_limit_pixels, settings.retry_after_s)
        num_decoders = share_cpus(settings).num_decoders
        self.decoders = Decoders(num_decoders, settings.hang_timeout_s, metrics, limits, tally)
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
        """Run a function in the pool of threads.

        A function that has not begun when its request ends never begins. One that has begun goes on, and
        ``place`` holds the request's bytes until it is done.
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

    def ready_tokenizer(self) -> ModelFacts:
        """What is known of the tokenizer.

        Raises:
            UnavailableError: the engine takes no work now.
        """
        self.engine.check_ready()
        return self.engine.tokenizer


def parts_of(request: Request) -> Parts:
    """The parts of the application that a request came to."""
    parts: Parts = request.app.state.parts
    return parts
