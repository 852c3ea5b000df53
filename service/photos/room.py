"""The pixels that requests have in the decoders: judged by the files' headers, bounded, given back."""

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from model.errors import PictureCostError
from model.images.costs import measure_picture
from service.errors import QueueFullError, TooLargeError
from service.photos.decode import UNKNOWN_PIXELS, ImagePart, ImageRules, capital, check_extent
from service.processes.tally import Tally
from service.telemetry.metrics import Metrics

LARGE_PIXELS = 16_000_000
"""Size of an image that keeps a decoder for long: at 10 to 60 ns per pixel, up to a second."""

_FIRST_PIXEL_S = 30e-9  # before any was measured: JPEG takes 15 ns, WebP 50 ns on a server's core
_MOST_PIXEL_S = 200e-9  # more says nothing of other images: a file may hide what it costs
_DEADLINE_MARGIN = 1.5
_MAX_RETRY_AFTER_S = 600


@dataclass(frozen=True)
class PixelLimits:
    """Most pixels of one request, most pixels of all requests, and the least Retry-After, seconds."""

    max_request_pixels: int = 256_000_000
    queue_limit_pixels: int = 2_000_000_000
    retry_after_s: int = 1


class PixelRoom:
    """The room for pixels that requests share. It belongs to the event loop's thread.

    Args:
        limits: the most that are taken.
        num_decoders: number that work side by side.
        metrics: where room and refusals are counted.
        tally: where the pixels of all processes are counted.
    """

    def __init__(self, limits: PixelLimits, num_decoders: int, metrics: Metrics, tally: Tally) -> None:
        self._limits = limits
        self._num_decoders = num_decoders
        self._metrics = metrics
        self._pixels = 0
        self._num_requests = 0
        self._pixel_s = _FIRST_PIXEL_S
        self._tally = tally
        metrics.pending_pixels.set_function(lambda: tally.total("pixels"))

    def judge(self, parts: Sequence[ImagePart], rules: ImageRules) -> list[int]:
        """The pixels of each image file of a request.

        Raises:
            TooLargeError: too many pixels in one image, or in all of them.
            ServiceError: a size that `service.photos.decode.check_size` refuses.
        """
        pixels = [_judge_image(part, rules) for part in parts]
        most = self._limits.max_request_pixels
        if sum(pixels) > most:
            raise TooLargeError(
                f"The request's images have {sum(pixels)} pixels in total; at most {most} are accepted."
            )
        return pixels

    @contextmanager
    def reserve(self, num_pixels: int, deadline_s: float) -> Iterator[None]:
        """Hold room for a request's pixels for the time of the block.

        Args:
            num_pixels: of all its images.
            deadline_s: when it must be done, on the clock of `time.monotonic`.

        Raises:
            QueueFullError: no room, or no hope to keep the deadline.
        """
        wait_s = self._wait_s(num_pixels)
        self._add(1, num_pixels)
        try:
            self._check_total(num_pixels)
            self._check_deadline(wait_s, deadline_s - time.monotonic())
            yield
        finally:
            self._add(-1, -num_pixels)

    def record(self, num_pixels: int, duration_s: float) -> None:
        """Note that a decoder took ``duration_s`` for an image."""
        newest = min(duration_s / num_pixels, _MOST_PIXEL_S)
        self._pixel_s += min(num_pixels / LARGE_PIXELS, 0.5) * (newest - self._pixel_s)

    def _check_total(self, num_pixels: int) -> None:
        """Refuse a request that was counted, and is too much together with the others."""
        others, most = self._tally.total("pixels") - num_pixels, self._limit(num_pixels)
        if others + num_pixels > most:
            raise self._full(
                "pixels",
                f"The decoders have {others} of at most {most} pixels to decode, and {num_pixels} more came.",
            )

    def _check_deadline(self, wait_s: float, left_s: float) -> None:
        if wait_s * _DEADLINE_MARGIN > left_s:
            raise self._full(
                "deadline",
                f"Decoding the request's images takes about {wait_s:.1f} s beside the others', too long for "
                f"its deadline of {left_s:.1f} s.",
            )

    def _limit(self, num_pixels: int) -> int:
        """A quarter of the room beside one large request is kept for requests of ordinary photos."""
        most = self._limits.queue_limit_pixels
        if num_pixels <= LARGE_PIXELS:
            return most
        return most - (most - self._limits.max_request_pixels) // 4

    def _wait_s(self, num_pixels: int) -> float:
        """How long a new request's images take, seconds: decoders serve the requests in turn."""
        its_turns = num_pixels * (self._num_requests + 1)
        return min(self._pixels + num_pixels, its_turns) * self._pixel_s / self._num_decoders

    def _full(self, reason: str, detail: str) -> QueueFullError:
        self._metrics.rejected_requests.labels(reason).inc()
        backlog_s = self._pixels * self._pixel_s / self._num_decoders
        retry_after_s = min(max(self._limits.retry_after_s, math.ceil(backlog_s)), _MAX_RETRY_AFTER_S)
        return QueueFullError(detail, {"Retry-After": str(retry_after_s)})

    def _add(self, num_requests: int, num_pixels: int) -> None:
        self._num_requests += num_requests
        self._pixels += num_pixels
        self._tally.add("pixels", num_pixels)


def _judge_image(part: ImagePart, rules: ImageRules) -> int:
    try:
        extent = measure_picture(part.data)
    except PictureCostError as exc:
        raise TooLargeError(f"{capital(part.name)} {exc}.") from exc
    if extent is None:
        return UNKNOWN_PIXELS
    check_extent(extent, rules, part.name)
    return extent.coded_pixels
