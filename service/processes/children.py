"""Processes that belong to the service: how they are started, the memory that they share, their messages.

A child inherits one end of a Unix socket pair and descriptors of shared memory, and ends when the socket
is closed. Bulk goes through the memory, small messages through the socket.
"""

import os
import socket
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

_ROOT = Path(__file__).parents[2]
_HEAD = struct.Struct("!I")  # bytes of the message that follows
_END_S = 1.0  # how long a child may take to end by itself


def share_memory(name: str, num_bytes: int) -> int:
    """File descriptor of memory that processes can map; pages that nobody writes take no room."""
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create(name)
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, num_bytes)
    return descriptor


def spawn(
    module: str, descriptors: Sequence[int], arguments: Sequence[str] = (), **environment: str
) -> "subprocess.Popen[bytes]":
    """Run ``python -m module`` with inherited descriptors, whose numbers are its first arguments.

    Raises:
        OSError: it cannot be started.
    """
    path = os.pathsep.join(filter(None, (str(_ROOT), os.environ.get("PYTHONPATH", ""))))
    return subprocess.Popen(
        [sys.executable, "-P", "-m", module, *map(str, descriptors), *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        pass_fds=descriptors,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
    )


def wait_or_kill(process: "subprocess.Popen[bytes]") -> int:
    """Wait, in a thread, for a process whose socket is closed and that has little time to end; its status."""
    try:
        return process.wait(_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()


def frame(message: bytes) -> bytes:
    """A message as it is sent."""
    return _HEAD.pack(len(message)) + message


class Frames:
    """Puts the messages of a socket together again."""

    def __init__(self) -> None:
        self._received = bytearray()

    def feed(self, data: bytes) -> Iterator[bytes]:
        """Take what came; gives the messages that are complete now."""
        self._received += data
        while len(self._received) >= _HEAD.size:
            (num_bytes,) = _HEAD.unpack_from(self._received)
            end = _HEAD.size + num_bytes
            if len(self._received) < end:
                return
            message = bytes(self._received[_HEAD.size : end])
            del self._received[:end]
            yield message


def socket_pair() -> tuple[socket.socket, socket.socket]:
    """Our end, which does not block, and the child's."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    return ours, theirs
