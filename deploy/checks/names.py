"""A name server with one name, for checks that need what a container network's resolver does."""

import socket
import struct
import threading
from types import TracebackType
from typing import Self

_TYPE_A, _CLASS_IN = 1, 1
_HEADER = struct.Struct("!6H")
_ANSWER = struct.Struct("!HHHIH4s")
_FLAGS = 0x8180  # a response, recursion desired and available, no error
_NAME_OF_QUESTION = 0xC00C  # a pointer to offset 12
_TTL_S = 1


class NameServer:
    """Answers every question for an address with the same addresses, over UDP, in a thread of its own.

    Attributes:
        addresses: IPv4; may be replaced at any time.
    """

    def __init__(self, addresses: list[str]) -> None:
        self.addresses = addresses
        self._socket = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        self._socket.bind(("127.0.0.1", 0))
        self._thread = threading.Thread(target=self._run, name="names", daemon=True)

    @property
    def endpoint(self) -> str:
        """``address:port`` to ask."""
        host, port = self._socket.getsockname()
        return f"{host}:{port}"

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._socket.sendto(b"", self._socket.getsockname())  # wakes the thread, and ends it
        self._thread.join(5)
        self._socket.close()

    def _run(self) -> None:
        while True:
            question, sender = self._socket.recvfrom(4096)
            if not question:
                return
            self._socket.sendto(answer(question, self.addresses), sender)


def answer(question: bytes, addresses: list[str]) -> bytes:
    """The response to a query of one question: the addresses if it asks for such, else none."""
    identity = _HEADER.unpack_from(question)[0]
    end = question.index(0, _HEADER.size) + 1
    kind, _ = struct.unpack_from("!2H", question, end)
    found = addresses if kind == _TYPE_A else []
    records = [
        _ANSWER.pack(_NAME_OF_QUESTION, _TYPE_A, _CLASS_IN, _TTL_S, 4, socket.inet_aton(address))
        for address in found
    ]
    header = _HEADER.pack(identity, _FLAGS, 1, len(records), 0, 0)
    return header + question[_HEADER.size : end + 4] + b"".join(records)
