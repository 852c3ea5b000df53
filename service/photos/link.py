"""The service's side of one decoder process: its jobs, its socket, and the shared memory."""

import asyncio
import json
import math
import mmap
import os
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor

from service.errors import ServiceError, from_fields
from service.photos.decode import ImagePart, ImageRules
from service.photos.process import ARENA_BYTES, NUM_SLOTS, PING, SLOT_BYTES, request_head
from service.photos.room import LARGE_PIXELS
from service.processes.children import Frames, share_memory, socket_pair, spawn, wait_or_kill

STORE_PIXELS = 4_000_000
"""Most pixels that a decoder is sent at once, unless one image has more: some 0.1 s of work, so that the
event loop may be late, and nobody waits long for those who came before."""
MAX_REQUEST_IMAGES = 3
"""Most images of one request that a decoder is sent at once, should they take longer than their size says."""
MAX_STALLS = 4
"""Checks in a row at which a decoder that has something to do made no progress: it is replaced then."""

_CLOCK_HZ = os.sysconf("SC_CLK_TCK")


@dataclass(eq=False)
class ImageRequest:
    """The images of one request.

    Attributes:
        waiting: those that no decoder has yet.
        is_slow: whether one took long, however small it is.
    """

    waiting: "deque[Job]" = field(default_factory=deque)
    is_slow: bool = False


@dataclass(eq=False)
class Job:
    """An image file on its way through a decoder.

    Attributes:
        num_pixels: cost of decoding it.
        attempts: decoders that ended while they had it first.
        begun_s: when it became its decoder's first.
        duration_s: how long its decoder took.
    """

    request: ImageRequest
    part: ImagePart
    rules: ImageRules
    num_pixels: int
    future: "asyncio.Future[Tensor]"
    attempts: int = 0
    begun_s: float = 0.0
    duration_s: float = 0.0

    @property
    def is_large(self) -> bool:
        """Whether it keeps a decoder for long."""
        return self.num_pixels > LARGE_PIXELS or self.request.is_slow

    def fail(self, error: ServiceError) -> None:
        """Settle it with an error, after which its request needs no other image."""
        self.request.waiting.clear()
        if not self.future.done():
            self.future.set_exception(error)


class DecoderLink(asyncio.Protocol):
    """One decoder process; all methods but `end` belong to the event loop's thread.

    Args:
        module: run by the process.
        on_answer: called after replies, with the jobs that they settled.
        on_lost: called with this once the process has closed its socket.

    Attributes:
        jobs: sent to it and not answered yet.
        ready: whether it ever answered.
        discarded: whether it was ended because nobody waited for its image any more.
        num_stalls: checks in a row at which it had made no progress.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(
        self,
        module: str,
        on_answer: Callable[[list[Job]], None],
        on_lost: Callable[["DecoderLink"], None],
    ) -> None:
        self.jobs: deque[Job] = deque()
        self.ready = False
        self.discarded = False
        self.num_stalls = 0
        self._free_slots: list[int] = []  # none before it is ready
        self._expected: deque[int | None] = deque([None])  # replies: slots of images, None for a hello
        self._num_replies = 0
        self._progress: tuple[int, float] = (0, 0.0)
        self._on_answer = on_answer
        self._on_lost = on_lost
        self._replies = Frames()
        self._transport: asyncio.Transport | None = None
        self._socket, theirs = socket_pair()
        with theirs:
            arena_fd = share_memory("drorae-decoder", ARENA_BYTES)
            try:
                self._arena = mmap.mmap(arena_fd, ARENA_BYTES)
                descriptors = (theirs.fileno(), arena_fd)
                self._process = spawn(module, descriptors, OPENBLAS_NUM_THREADS="1")
            except OSError:
                self._socket.close()
                raise
            finally:
                os.close(arena_fd)

    @property
    def pid(self) -> int:
        """Process id."""
        return self._process.pid

    @property
    def responds(self) -> bool:
        """Whether it is ready and has answered lately."""
        return self.ready and self.num_stalls < MAX_STALLS // 2

    async def connect(self) -> None:
        """Be usable from now on."""
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=self._socket)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has the methods, not the class

    def connection_lost(self, exc: Exception | None) -> None:
        self._free_slots = []
        self._on_lost(self)

    @property
    def has_room(self) -> bool:
        """Whether there may be an image that it takes."""
        return bool(self._free_slots) and self.responds

    def takes(self, job: Job) -> bool:
        """Whether it takes this image now: several only where they are soon done, and lie in the arena."""
        if not self.has_room:
            return False
        num_pixels = sum(other.num_pixels for other in self.jobs) + job.num_pixels
        num_images = sum(other.request is job.request for other in self.jobs)
        is_short = len(job.part.data) <= SLOT_BYTES
        return not self.jobs or (is_short and num_pixels <= STORE_PIXELS and num_images < MAX_REQUEST_IMAGES)

    @property
    def is_behind(self) -> bool:
        """Whether bytes of its first image wait in this process because it has not read them."""
        return self._transport is not None and self._transport.get_write_buffer_size() > 0

    def send(self, job: Job) -> None:
        """Give it an image, for which it has room."""
        assert self._transport is not None
        slot = self._free_slots.pop()
        if not self.jobs:
            job.begun_s = time.monotonic()
        self.jobs.append(job)
        self._expected.append(slot)
        data, start = job.part.data, slot * SLOT_BYTES
        fits = len(data) <= SLOT_BYTES
        if fits:
            self._arena[start : start + len(data)] = data
        self._transport.write(request_head(slot, job.part.name, job.rules, job.num_pixels, len(data)))
        if not fits:
            self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        answered: list[Job] = []
        for reply in self._replies.feed(data):
            self._take(reply, answered)
        self._on_answer(answered)

    def _take(self, reply: bytes, answered: list[Job]) -> None:
        """Settle the first job, or note that the process says hello."""
        self._num_replies += 1
        self.num_stalls = 0
        slot = self._expected.popleft()
        if slot is None:
            if not self.ready:
                self.ready, self._free_slots = True, list(range(NUM_SLOTS))
            return
        job, now_s = self.jobs.popleft(), time.monotonic()
        job.duration_s = now_s - job.begun_s
        answered.append(job)
        if reply:
            job.fail(from_fields(json.loads(reply)))
        elif not job.future.done():
            shape = (job.rules.side, job.rules.side, 3)
            pixels = np.frombuffer(self._arena, np.uint8, math.prod(shape), slot * SLOT_BYTES)
            pixels = pixels.copy()  # the slot is the next image's
            job.future.set_result(torch.from_numpy(pixels).view(shape).permute(2, 0, 1))
        self._free_slots.append(slot)
        if self.jobs:
            self.jobs[0].begun_s = now_s

    def check_progress(self) -> bool:
        """See whether it answered, or computed, since the last check; one that is idle must say hello.

        Returns:
            Whether it made progress lately. The checks are counted, not the seconds: the service itself may
            have been stopped, or starved.
        """
        progress = self._num_replies, self._cpu_s()
        self.num_stalls = 0 if progress != self._progress or not self._expected else self.num_stalls + 1
        self._progress = progress
        if not self._expected and self._transport is not None:
            self._expected.append(None)
            self._transport.write(PING)
        return self.num_stalls < MAX_STALLS

    def _cpu_s(self) -> float:
        """CPU time of the process, seconds; 0 where the system does not tell."""
        try:
            with open(f"/proc/{self._process.pid}/stat", encoding="ascii") as stream:
                fields = stream.read().rpartition(")")[2].split()
        except (OSError, UnicodeDecodeError):
            return 0.0
        return (int(fields[11]) + int(fields[12])) / _CLOCK_HZ

    def check_alive(self) -> None:
        """Take no more work where the process has ended; its jobs come back once its socket tells so."""
        if self._process.poll() is not None:
            self._free_slots = []

    def kill(self) -> None:
        """End the process now; it is lost once its socket tells so."""
        self._free_slots = []
        self._process.kill()

    def status(self) -> int:
        """Exit status of the process, which has closed its socket: it has ended, or is ended now."""
        self._process.kill()
        return self._process.wait()

    def disconnect(self) -> None:
        """Close the connection, which ends the process."""
        if self._transport is not None:
            self._transport.abort()

    def end(self) -> int:
        """Wait, in a thread, for a disconnected process, which has little time to end; its status."""
        return wait_or_kill(self._process)
