"""One decoder: a process that turns image files into pixels, without PyTorch or the service's memory.

``python -m service.decoder SOCKET ARENA`` is how `service.decoders` starts it; both numbers are inherited
file descriptors. The socket carries requests and a reply to each in order. Files and pixels go through the
arena, memory that both processes map; only a file too large for its slot comes through the socket, after
its request. It ends when the socket is closed.
"""

import functools
import json
import logging
import mmap
import os
import signal
import socket
import struct
import sys
from dataclasses import asdict
from typing import BinaryIO

from service.decoding import ImageRules, decode_image
from service.errors import InternalError, ServiceError

logger = logging.getLogger(__name__)

MAX_SIDE = 1024  # pixels; `model.config` allows no larger image
SLOT_BYTES = 3 * MAX_SIDE**2
"""Room for one image: first for its file, then for its pixels."""
NUM_SLOTS = 8
"""Images that a decoder has at most: one that it works on, and some in store while the event loop is busy."""
ARENA_BYTES = NUM_SLOTS * SLOT_BYTES

REQUEST = struct.Struct("!II")
"""Bytes of the request's JSON, which follows, and of the image file."""
REPLY = struct.Struct("!I")
"""Bytes of the reply's JSON, which names the error and follows; 0 where the pixels are in the arena, and once
at the beginning, when the decoder is ready."""


def request_head(slot: int, name: str, rules: ImageRules, num_bytes: int) -> bytes:
    """A request: the slot of the file and its pixels, its name for errors, its rules, its size."""
    fields = f'{{"slot": {slot}, "name": {json.dumps(name)}, "rules": {_rules_json(rules)}}}'.encode()
    return REQUEST.pack(len(fields), num_bytes) + fields


@functools.lru_cache(maxsize=8)
def _rules_json(rules: ImageRules) -> str:
    return json.dumps(asdict(rules))


def serve(connection: socket.socket, arena: mmap.mmap) -> None:
    """Decode what comes until the other side closes the connection."""
    connection.sendall(REPLY.pack(0))
    with connection.makefile("rb") as requests:
        while (head := requests.read(REQUEST.size)) and len(head) == REQUEST.size:
            connection.sendall(_reply(requests, head, arena))


def _reply(requests: BinaryIO, head: bytes, arena: mmap.mmap) -> bytes:
    num_field_bytes, num_bytes = REQUEST.unpack(head)
    fields = json.loads(requests.read(num_field_bytes))
    start = fields["slot"] * SLOT_BYTES
    data = arena[start : start + num_bytes] if num_bytes <= SLOT_BYTES else requests.read(num_bytes)
    try:
        pixels = decode_image(data, ImageRules(**fields["rules"]), fields["name"]).tobytes()
    except ServiceError as exc:
        return _error(exc)
    except Exception:  # the process's boundary: the next image must find it alive
        logger.exception("a decoder failed on an image")
        return _error(InternalError("The image could not be decoded; the service's log has the details."))
    arena[start : start + len(pixels)] = pixels
    return REPLY.pack(0)


def _error(error: ServiceError) -> bytes:
    document = json.dumps({"kind": type(error).__name__, "detail": error.detail}).encode()
    return REPLY.pack(len(document)) + document


def main() -> int:
    """Serve the inherited socket until it is closed."""
    for number in (signal.SIGINT, signal.SIGTERM):  # a drain needs its decoders: the service ends them
        signal.signal(number, signal.SIG_IGN)
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
