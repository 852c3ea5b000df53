"""The first steps of a serving process, before it imports PyTorch and the web framework."""

import os
import signal
from types import FrameType

from model.process import limit_threads


def prepare() -> None:
    """Bound the process' threads, and let SIGTERM and SIGINT end it with status 0.

    Until the server takes the signals over, nothing has begun that would have to be ended in order.
    """
    limit_threads()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _leave)


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(0)  # an exception would end up in whatever is being imported
