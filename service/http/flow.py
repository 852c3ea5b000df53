"""How a connection reads, and how answers are written to it, where uvicorn's own way is not enough."""

import asyncio
from collections.abc import Callable

from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import RequestResponseCycle

_CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
_FIRST_ASK_S = 0.05


class HeldFlow(FlowControl):
    """Lets nobody resume reading while bytes wait that could not be parsed."""

    is_held = False

    def resume_reading(self) -> None:
        """Read on, if nothing waits."""
        if not self.is_held:
            super().resume_reading()


class AnswerTransport:
    """The connection's transport as an answer sees it: it closes in another way.

    Args:
        transport: of the connection.
        leave: called instead of its ``close``.
    """

    def __init__(self, transport: asyncio.Transport, leave: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = leave


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
