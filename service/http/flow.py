"""How a connection reads, and how answers are written to it, where uvicorn's own way is not enough."""

import asyncio
from collections.abc import Callable

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

_INTERIM = b"HTTP/1.1 1"
_CONTINUE = _INTERIM + b"00 Continue\r\n\r\n"
_FIRST_ASK_S = 0.05


class HeldFlow(FlowControl):
    """Lets nobody resume reading while bytes wait that could not be parsed."""

    is_held = False

    def resume_reading(self) -> None:
        """Read on, if nothing waits."""
        if not self.is_held:
            super().resume_reading()


class AnswerTransport:
    """The connection's transport as an answer sees it: it writes head and body at once, and closes otherwise.

    Uvicorn writes them one after the other. Each is a system call, and wakes the client: together they took a
    seventh of the event loop's time for a single photo.

    Args:
        transport: of the connection.
        leave: called instead of its ``close``.
    """

    def __init__(self, transport: asyncio.Transport, leave: Callable[[], None]) -> None:
        self.is_closing = transport.is_closing
        self._transport = transport
        self._leave = leave
        self._head: bytes | None = None

    def write(self, data: bytes) -> None:
        """Write on. The head, which comes first, waits for what follows it; an interim answer does not."""
        if self._head is None and not data.startswith(_INTERIM):
            self._head = data
        elif self._head:
            self._transport.writelines((self._head, data))
            self._head = b""
        else:
            self._transport.write(data)

    def flush(self) -> None:
        """Write a head that nothing follows."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        """Write what waits, and leave the connection."""
        self.flush()
        self._leave()


def ask_while_unanswered(
    cycle: RequestResponseCycle, loop: asyncio.AbstractEventLoop, again_s: float = _FIRST_ASK_S
) -> None:
    """Find out whether a client is still there that sends no more: one that is gone resets the connection.

    A client that waits for its answer skips this interim response (RFC 9110, 15.2). It is asked again, less
    and less often, since only what follows the reset fails.
    """
    if not cycle.response_started and not cycle.transport.is_closing():
        cycle.transport.write(_CONTINUE)
        loop.call_later(again_s, ask_while_unanswered, cycle, loop, 2 * again_s)
