"""Clients that run side by side while something happens to the service."""

import threading
from types import TracebackType
from typing import Self


class Clients:
    """Threads from entering to leaving, which waits until each has ended with its last answer.

    Args:
        count: how many.
    """

    def __init__(self, count: int) -> None:
        self._stopped = threading.Event()
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(count)]

    def __enter__(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stopped.set()
        for thread in self._threads:
            thread.join()

    def _run(self, number: int) -> None:
        """Send requests until ``_stopped`` is set; the body of a thread."""
        raise NotImplementedError
