"""The pool of decoder processes, driven by the event loop.

Images are decoded in processes of their own because threads would have to share the interpreter with the
event loop, and because a decoder that crashes or hangs on a hostile file then takes nothing with it: it is
started again, and the image that it was at is tried once more.
"""

import asyncio
import json
import logging
import math
import mmap
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from service import errors
from service.decoder import ARENA_BYTES, NUM_SLOTS, REPLY, SLOT_BYTES, request_head
from service.decoding import ImageRules
from service.errors import InternalError, MalformedError, ServiceError, UnavailableError
from service.metrics import Metrics
from service.payloads import ImagePart

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
"""How many decoders an image may bring down: some that it is given may have been ended by something else."""
_MODULE = "service.decoder"
_ROOT = Path(__file__).parent.parent
_FIRST_PAUSE_S = 0.05
_LONGEST_PAUSE_S = 5.0
_START_S = 30.0
_END_S = 0.5  # how long a decoder may take to end by itself


@dataclass(eq=False)
class _Job:
    """An image file on its way through a decoder.

    Attributes:
        attempts: decoders that ended while they had it first.
        begun_s: when it became its decoder's first.
    """

    part: ImagePart
    rules: ImageRules
    future: "asyncio.Future[Tensor]"
    attempts: int = 0
    begun_s: float = 0.0


class Decoders:
    """Processes that decode image files; all methods belong to the event loop's thread.

    Args:
        num_processes: how many.
        timeout_s: how long one image may take, seconds, before its decoder is ended.
        metrics: where decoders that fail are counted.
    """

    def __init__(self, num_processes: int, timeout_s: float, metrics: Metrics) -> None:
        self.num_processes = num_processes
        self._timeout_s = timeout_s
        self._metrics = metrics
        self._decoders: list[_Decoder] = []
        self._waiting: deque[_Job] = deque()
        self._num_failures = 0  # since a decoder last answered
        self._closed = False
        self._all_ready = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Start the processes and wait, within reason, until all are ready."""
        self._keep(self._watch())
        for _ in range(self.num_processes):
            self._keep(self._add())
        try:
            async with asyncio.timeout(_START_S):
                await self._all_ready.wait()
        except TimeoutError:
            logger.error("not all decoders were ready after %g s", _START_S)

    async def decode(self, parts: Sequence[ImagePart], rules: ImageRules) -> list[Tensor]:
        """Image files to tensors, each [3, S, S] uint8, a view of interleaved pixels.

        Files whose decoding has not begun when this is cancelled never are decoded.

        Raises:
            ServiceError: one cannot be read; the sentence names it.
        """
        if self._closed:
            raise UnavailableError("The service is draining and takes no new work.")
        loop = asyncio.get_running_loop()
        jobs = [_Job(part, rules, loop.create_future()) for part in parts]
        self._waiting += jobs
        self._assign()
        try:
            return [await job.future for job in jobs]
        finally:
            for job in jobs:
                if not job.future.cancel() and not job.future.cancelled():
                    job.future.exception()  # of several bad images the first is told

    async def close(self) -> None:
        """End the processes; whatever still waits for one fails."""
        self._closed = True
        for task in self._tasks:
            task.cancel()
        jobs = [*self._waiting, *(job for decoder in self._decoders for job in decoder.jobs)]
        for job in jobs:
            _settle(job, UnavailableError("The service stopped before this was done."))
        await asyncio.gather(*(asyncio.to_thread(decoder.end) for decoder in self._decoders))

    async def _add(self, pause_s: float = 0.0) -> None:
        """Start a process after a pause; one that cannot be started is tried again."""
        await asyncio.sleep(pause_s)
        try:
            decoder = _Decoder(self._answered, self._lost)
        except OSError as exc:
            logger.error("no decoder could be started: %s", exc)
            self._num_failures += 1
            self._keep(self._add(self._pause_s()))
            return
        self._decoders.append(decoder)
        await decoder.connect()

    def _keep(self, coroutine: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _assign(self) -> None:
        """Give waiting jobs to the decoders that have least to do."""
        while self._waiting:
            usable = [decoder for decoder in self._decoders if decoder.free_slots]
            if not usable:
                return
            job = self._waiting.popleft()
            if not job.future.done():
                min(usable, key=lambda decoder: len(decoder.jobs)).send(job)

    def _answered(self) -> None:
        self._num_failures = 0
        if sum(decoder.ready for decoder in self._decoders) == self.num_processes:
            self._all_ready.set()
        self._assign()

    def _lost(self, decoder: "_Decoder") -> None:
        """A decoder has ended: start another, and try again what it had."""
        if self._closed:
            return
        self._decoders.remove(decoder)
        for other in self._decoders:
            other.check_alive()
        status = decoder.kill()
        self._metrics.decoder_failures.inc()
        logger.error("a decoder ended with status %s and is started again", status)
        if decoder.jobs:
            first = decoder.jobs[0]
            first.attempts += 1
            if first.attempts >= MAX_ATTEMPTS:
                name = first.part.name
                _settle(first, MalformedError(f"{name} brought its decoder down, and is taken for damaged"))
        self._waiting.extendleft(job for job in reversed(decoder.jobs) if not job.future.done())
        self._num_failures += 1
        self._keep(self._add(self._pause_s()))
        self._assign()

    def _pause_s(self) -> float:
        """Before a decoder is started again: longer where they fail one after the other."""
        return min(_FIRST_PAUSE_S * 2.0 ** min(self._num_failures, 10), _LONGEST_PAUSE_S)

    async def _watch(self) -> None:
        """End decoders that are at one image for too long; what they had is then tried again or fails."""
        while True:
            await asyncio.sleep(self._timeout_s / 4)
            limit_s = time.monotonic() - self._timeout_s
            for decoder in list(self._decoders):
                if decoder.jobs and decoder.jobs[0].begun_s < limit_s:
                    logger.error("a decoder has been at one image for over %g s", self._timeout_s)
                    decoder.jobs[0].attempts = MAX_ATTEMPTS
                    decoder.kill()


class _Decoder(asyncio.Protocol):
    """One process: what was sent to it and not answered yet, its socket, and the memory its pixels come in.

    Args:
        on_answer: called after replies, the first of which only says that it is ready.
        on_lost: called with this once the process has closed its socket.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(self, on_answer: Callable[[], None], on_lost: Callable[["_Decoder"], None]) -> None:
        self.jobs: deque[_Job] = deque()
        self.ready = False
        self.free_slots: list[int] = []  # none before it is ready
        self._slots: deque[int] = deque()
        self._on_answer = on_answer
        self._on_lost = on_lost
        self._replies = bytearray()
        self._transport: asyncio.Transport | None = None
        self._socket, theirs = socket.socketpair()
        self._socket.setblocking(False)
        with theirs:
            arena_fd = _arena()
            try:
                self._arena = mmap.mmap(arena_fd, ARENA_BYTES)
                self._process = _spawn(theirs.fileno(), arena_fd)
            except OSError:
                self._socket.close()
                raise
            finally:
                os.close(arena_fd)

    async def connect(self) -> None:
        """Be usable from now on."""
        await asyncio.get_running_loop().create_unix_connection(lambda: self, sock=self._socket)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has the methods, not the class

    def connection_lost(self, exc: Exception | None) -> None:
        self.free_slots = []
        self._on_lost(self)

    def send(self, job: _Job) -> None:
        """Give it an image; there is a free slot."""
        assert self._transport is not None
        slot = self.free_slots.pop()
        if not self.jobs:
            job.begun_s = time.monotonic()
        self.jobs.append(job)
        self._slots.append(slot)
        data, start = job.part.data, slot * SLOT_BYTES
        fits = len(data) <= SLOT_BYTES
        if fits:
            self._arena[start : start + len(data)] = data
        self._transport.write(request_head(slot, job.part.name, job.rules, len(data)))
        if not fits:
            self._transport.write(data)

    def data_received(self, data: bytes) -> None:
        self._replies += data
        while len(self._replies) >= REPLY.size:
            (num_bytes,) = REPLY.unpack_from(self._replies)
            end = REPLY.size + num_bytes
            if len(self._replies) < end:
                return
            self._take(bytes(self._replies[REPLY.size : end]))
            del self._replies[:end]
        self._on_answer()

    def _take(self, reply: bytes) -> None:
        """Settle the first job, or be ready."""
        if not self.ready:
            self.ready, self.free_slots = True, list(range(NUM_SLOTS))
            return
        job, slot = self.jobs.popleft(), self._slots.popleft()
        if reply:
            fields = json.loads(reply)
            kind = getattr(errors, fields["kind"], InternalError)
            _settle(job, kind(fields["detail"]))
        elif not job.future.done():
            shape = (job.rules.side, job.rules.side, 3)
            slots = torch.frombuffer(self._arena, dtype=torch.uint8).view(-1, SLOT_BYTES)
            pixels = slots[slot, : math.prod(shape)].clone()  # the slot is the next image's
            job.future.set_result(pixels.view(shape).permute(2, 0, 1))
        self.free_slots.append(slot)
        if self.jobs:
            self.jobs[0].begun_s = time.monotonic()

    def check_alive(self) -> None:
        """Take no more work where the process has ended; its jobs come back once its socket tells so."""
        if self._process.poll() is not None:
            self.free_slots = []

    def kill(self) -> int:
        """End the process now; its status, which is its own where it had ended already."""
        self._process.kill()
        return self._process.wait()

    def end(self) -> int:
        """Close the connection and wait for the process, which has little time to end; its status."""
        if self._transport is not None:
            self._transport.abort()
        try:
            return self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def _settle(job: _Job, error: ServiceError) -> None:
    if not job.future.done():
        job.future.set_exception(error)


def _arena() -> int:
    """File descriptor of memory for the pixels; pages that nobody writes take no room."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("drorae-decoder")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, ARENA_BYTES)
    return descriptor


def _spawn(socket_fd: int, arena_fd: int) -> "subprocess.Popen[bytes]":
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", _MODULE, str(socket_fd), str(arena_fd)],
        env={**os.environ, "PYTHONPATH": path, "OPENBLAS_NUM_THREADS": "1"},
        pass_fds=(socket_fd, arena_fd),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )
