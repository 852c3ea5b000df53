"""The fronts of one service, in the engine's process: started, started again, and ended in order."""

import asyncio
import logging
import signal
import socket
import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path

import torch

from service.engine.engine import Engine, Load
from service.processes.children import share_memory
from service.processes.fronts.link import FrontLink
from service.processes.fronts.memory import Ledger, arena_bytes, ledger_bytes
from service.processes.fronts.messages import settings_environment, settings_of_front
from service.processes.tally import ITEMS
from service.settings import Settings
from service.telemetry.files import FOLDER_VARIABLE, forget_gauges, render_all
from service.telemetry.metrics import Metrics

logger = logging.getLogger(__name__)

_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 5.0
_LOOK_S = 0.05
_BEYOND_DRAIN_S = 5.0  # for answers under way, and for a front's own end
_LAST_BATCH_S = 0.3


class Fronts:
    """Fronts around one engine; all methods but `run` belong to the event loop's thread.

    Args:
        settings: everything that can be set.
        listener: the listening socket, from which all fronts accept.
        load: gives the tokenizer of one device; called in the engine's thread.
        on_ready: called in that thread when the engine begins to take work.

    Attributes:
        engine: that all fronts share.
    """

    def __init__(
        self, settings: Settings, listener: socket.socket, load: Load, on_ready: Callable[[], None]
    ) -> None:
        self._settings = settings
        self._listener = listener
        self._environment = settings_environment(settings_of_front(settings))
        self._environment["CUDA_VISIBLE_DEVICES"] = ""  # devices are the engine's
        self._metrics = Metrics()
        self._ledger_fd = share_memory("drorae-ledger", ledger_bytes(settings.frontends))
        self._ledger = Ledger(self._ledger_fd, settings.frontends)
        self.engine = Engine(settings, self._metrics, load, self._engine_failed, on_ready, self._ledger.rates)
        self._links: dict[int, FrontLink] = {}
        self._num_failed_starts = 0
        self._signals: list[int] = []
        self._tasks: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._count_what_requests_hold()

    async def run(self) -> None:
        """Serve until a signal, or until the engine fails; then until the fronts have ended."""
        torch.set_num_threads(1)  # of this thread, which copies results
        self._loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._stop, number)
        self.engine.start()
        with tempfile.TemporaryDirectory(prefix="drorae-metrics-") as folder:
            self._folder = Path(folder)
            for index in range(self._settings.frontends):
                self._keep(self._add(index))
            self._keep(self._tell_once_settled())
            await self._ended.wait()
            for task in self._tasks:
                task.cancel()
            await asyncio.to_thread(self.engine.close, _LAST_BATCH_S)

    def _count_what_requests_hold(self) -> None:
        tally, metrics = self._ledger.tally(), self._metrics
        metrics.pending_items.set_function(lambda: sum(tally.total(name) for name in ITEMS))
        metrics.pending_bytes.set_function(lambda: tally.total("bytes"))
        metrics.pending_pixels.set_function(lambda: tally.total("pixels"))

    async def _add(self, index: int, pause_s: float = 0.0) -> None:
        """Start a front after a pause; one that cannot be started is tried again."""
        await asyncio.sleep(pause_s)
        if self._signals:
            return
        try:
            link = FrontLink(
                index,
                self.engine,
                arena_bytes(self._settings),
                (self._listener.fileno(), self._ledger_fd),
                {**self._environment, FOLDER_VARIABLE: str(self._folder)},
                self._page,
                self._lost,
            )
        except OSError as exc:
            self._start_again(index, f"front {index} could not be started: {exc}")
            return
        self._links[index] = link
        await link.connect()
        for number in self._signals:
            link.stop(number)

    async def _tell_once_settled(self) -> None:
        while not self.engine.wait_until_settled(0):
            await asyncio.sleep(_LOOK_S)
        for link in self._links.values():
            link.tell_state()

    def _page(self) -> bytes:
        return render_all(self._metrics.registry, self._folder)

    def _lost(self, link: FrontLink) -> None:
        self._keep(self._replace(link))

    async def _replace(self, link: FrontLink) -> None:
        """A front has ended: its requests hold nothing any more; start another, unless the service stops."""
        status = await asyncio.to_thread(link.end)
        del self._links[link.index]
        self._ledger.tally().clear(link.index)
        forget_gauges(str(link.index), self._folder)
        if not self._signals:
            self._num_failed_starts = 0 if link.ready else self._num_failed_starts + 1
            self._start_again(link.index, f"front {link.index} ended with status {status}")
        elif not self._links:
            self._ended.set()

    def _start_again(self, index: int, reason: str) -> None:
        pause_s = min(_FIRST_PAUSE_S * 2.0 ** min(self._num_failed_starts, 10), _LONGEST_PAUSE_S)
        logger.error("%s and is started again", reason)
        self._keep(self._add(index, pause_s))

    def _engine_failed(self) -> None:
        """Called in the engine's thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._end_for_failure)

    def _end_for_failure(self) -> None:
        for link in self._links.values():
            link.tell_state()
        self._stop(signal.SIGTERM)

    def _stop(self, number: int) -> None:
        """Drain; the fronts go on until their requests are answered. A second signal makes it short."""
        if not self._signals:
            self.engine.start_draining()
            self._keep(self._end_in_time())
        self._signals.append(number)
        for link in self._links.values():
            link.stop(number)
        if not self._links:
            self._ended.set()

    async def _end_in_time(self) -> None:
        await asyncio.sleep(self._settings.drain_timeout_s + _BEYOND_DRAIN_S)
        for link in self._links.values():
            logger.error("front %d did not end in time", link.index)
            link.kill()

    def _keep(self, coroutine: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
