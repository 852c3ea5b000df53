"""Lines in the log while something long goes on."""

import logging
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
LOG_EVERY_S = 10.0


def log_progress(items: Iterable[Item], total: int, what: str) -> Iterator[Item]:
    """The items as they are, with a line at the start and one every ten seconds.

    Args:
        items: any.
        total: how many there are at most.
        what: a noun, such as ``the cache``.
    """
    logger.info("%s: begins", what)
    last = time.monotonic()
    for number, item in enumerate(items):
        if time.monotonic() - last >= LOG_EVERY_S:
            last = time.monotonic()
            logger.info("%s: %.0f %% done", what, 100 * number / total)
        yield item
