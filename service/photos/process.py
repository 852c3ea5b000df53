"""One decoder: a process that turns image files into pixels, without PyTorch or the service's memory.

``python -m service.photos.process SOCKET ARENA`` is how `service.photos.pool` starts it; both numbers are
inherited file descriptors. The socket carries requests and a reply to each in order. Files and pixels go
through the arena, memory that both processes map; only a file too large for its slot comes through the
socket, after its request. It ends when the socket is closed.
"""

import functools
import json
import logging
import mmap
import os
import resource
import signal
import socket
import struct
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import BinaryIO

from model.process import keep_freed_memory
from service.errors import InternalError, ServiceError, TooLargeError, to_fields
from service.photos.decode import ImageRules, capital, decode_image
from service.processes.children import frame

logger = logging.getLogger(__name__)

MAX_SIDE = 1024  # pixels; `model.config` allows no larger image
SLOT_BYTES = 3 * MAX_SIDE**2
"""Room for one image: first for its file, then for its pixels."""
NUM_SLOTS = 8
"""Images that a decoder has at most: one that it works on, and some in store while the event loop is busy."""
ARENA_BYTES = NUM_SLOTS * SLOT_BYTES

CPU_SIGNAL = signal.SIGPROF
"""Ends a decoder whose image takes too much CPU time."""
BASE_CPU_S, PIXEL_CPU_S = 1.5, 100e-9
"""CPU time of an image, seconds, and more per pixel. The slowest files take 20 to 60 ns per pixel."""
BASE_BYTES, PIXEL_BYTES = 128 * 2**20, 32
"""Memory of an image, bytes, and more per pixel. WebP with alpha takes 20 per pixel."""

_KEPT_BYTES = 16 * 2**20
"""Memory that stays for the next image. Pages that came anew took a sixth of a small photo's time."""

REQUEST = struct.Struct("!II")
"""Bytes of the request's JSON, which follows, and of the image file."""
PING = REQUEST.pack(0, 0)
"""A request of nothing: the decoder answers as at the beginning."""
DONE = frame(b"")
"""The reply where the pixels are in the arena, and once at the beginning, when the decoder is ready. Other
replies are JSON that tells the error."""


def request_head(slot: int, name: str, rules: ImageRules, num_pixels: int, num_bytes: int) -> bytes:
    """A request: the slot of the file and its pixels, name for errors, rules, pixels to decode, file size."""
    fields = (
        f'{{"slot": {slot}, "name": {json.dumps(name)}, "rules": {_rules_json(rules)}, '
        f'"num_pixels": {num_pixels}}}'
    ).encode()
    return REQUEST.pack(len(fields), num_bytes) + fields


@functools.lru_cache(maxsize=8)
def _rules_json(rules: ImageRules) -> str:
    return json.dumps(asdict(rules))


def serve(connection: socket.socket, arena: mmap.mmap) -> None:
    """Decode images until the other side closes the connection."""
    connection.sendall(DONE)
    with connection.makefile("rb") as requests:
        while (head := requests.read(REQUEST.size)) and len(head) == REQUEST.size:
            connection.sendall(DONE if head == PING else _reply(requests, head, arena))


def _reply(requests: BinaryIO, head: bytes, arena: mmap.mmap) -> bytes:
    num_field_bytes, num_bytes = REQUEST.unpack(head)
    fields = json.loads(requests.read(num_field_bytes))
    start = fields["slot"] * SLOT_BYTES
    data = arena[start : start + num_bytes] if num_bytes <= SLOT_BYTES else requests.read(num_bytes)
    name = fields["name"]
    try:
        with _bounded(fields["num_pixels"], len(data)):
            pixels = decode_image(data, ImageRules(**fields["rules"]), name).tobytes()
    except ServiceError as exc:
        return _error(exc)
    except MemoryError:
        return _error(
            TooLargeError(f"{capital(name)} takes more memory to decode than a picture of its size may take.")
        )
    except Exception:  # the process's boundary: the next image must find it alive
        logger.exception("a decoder failed on an image")
        return _error(InternalError("The image could not be decoded; the service's log has the details."))
    arena[start : start + len(pixels)] = pixels
    return DONE


@contextmanager
def _bounded(num_pixels: int, num_bytes: int) -> Iterator[None]:
    """Limit the CPU time of the block, and its memory beyond the process's own.

    The timer's signal ends the process, also in a library that never returns, and counts no time in which
    the process is stopped or starved. Without memory, allocations fail.
    """
    _, most_bytes = resource.getrlimit(resource.RLIMIT_AS)
    allowed_bytes = _mapped_bytes() + BASE_BYTES + PIXEL_BYTES * num_pixels + 4 * num_bytes
    if most_bytes == resource.RLIM_INFINITY or allowed_bytes < most_bytes:
        resource.setrlimit(resource.RLIMIT_AS, (allowed_bytes, most_bytes))
    signal.setitimer(signal.ITIMER_PROF, BASE_CPU_S + PIXEL_CPU_S * num_pixels)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        resource.setrlimit(resource.RLIMIT_AS, (most_bytes, most_bytes))


def _mapped_bytes() -> int:
    """Address space of this process, bytes; a lot where the system does not tell."""
    try:
        return int(os.pread(_statm(), 64, 0).split()[0]) * resource.getpagesize()
    except OSError:
        return 2**40


@functools.cache
def _statm() -> int:
    """File descriptor of what the system tells of this process's memory."""
    return os.open("/proc/self/statm", os.O_RDONLY)


def _error(error: ServiceError) -> bytes:
    return frame(json.dumps(to_fields(error)).encode())


def main() -> int:
    """Serve the inherited socket until it is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a drain needs its decoders: the service ends them
        signal.signal(number, signal.SIG_IGN)
    keep_freed_memory(_KEPT_BYTES)
    logging.basicConfig(format="%(levelname)s %(name)s: %(message)s")
    socket_fd, arena_fd = (int(argument) for argument in sys.argv[1:3])
    with mmap.mmap(arena_fd, ARENA_BYTES) as arena, socket.socket(fileno=socket_fd) as connection:
        os.close(arena_fd)
        try:
            serve(connection, arena)
        except (BrokenPipeError, ConnectionResetError):
            return 0  # the service is gone
    return 0


if __name__ == "__main__":
    sys.exit(main())
