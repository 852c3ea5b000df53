"""Threads that work for one consumer."""

from collections.abc import Callable
from functools import partial
from queue import SimpleQueue
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self


class StoppedError(Exception):
    """The consumer has gone; nobody waits for the result."""


class Workers:
    """Daemon threads, started as jobs come. Unlike a pool's, they do not keep the interpreter from ending.

    All that workers report is done in the consumer's thread, so that nothing needs a lock.

    Args:
        work: does a job; its arguments are those of `begin`. An error is raised in the consumer's thread.
        most: threads.
    """

    def __init__(self, work: Callable[..., None], most: int) -> None:
        self._work = work
        self._most = most
        self._jobs: SimpleQueue[tuple[Any, ...] | None] = SimpleQueue()
        self._reports: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._num_threads = 0
        self.stop = Event()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Wake up and end all threads; a request that is under way ends with its answer."""
        self.stop.set()
        for _ in range(self._num_threads):
            self._jobs.put(None)

    def begin(self, *job: Any) -> None:
        """Have a thread do a job."""
        if self._num_threads < self._most:
            self._num_threads += 1
            Thread(target=self._run, name="drorae-client", daemon=True).start()
        self._jobs.put(job)

    def report(self, news: Callable[[], None]) -> None:
        """Have the consumer's thread call a function."""
        self._reports.put(news)

    def hear(self) -> None:
        """Call what was reported."""
        while not self._reports.empty():
            self._reports.get()()

    def wait(self) -> None:
        """Wait for a report, and call it."""
        self._reports.get()()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                self._work(*job)
            except StoppedError:
                return
            except Exception as exc:  # a worker's boundary: the consumer raises it
                self.report(partial(raise_it, exc))


def raise_it(error: Exception) -> None:
    """Raise an error, where a function is wanted."""
    raise error
