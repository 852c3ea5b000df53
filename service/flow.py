"""How a connection reads, and how answers are written to it, where uvicorn's own way is not enough."""

import asyncio
from collections.abc import Callable

from uvicorn.protocols.http.flow_control import FlowControl


class HeldFlow(FlowControl):
    """Lets nobody resume reading while bytes wait that could not be parsed."""

    is_held = False

    def resume_reading(self) -> None:
        """Read on, if nothing waits."""
        if not self.is_held:
            super().resume_reading()


class AnswerTransport:
    """What a request's answer is written to: the connection's transport, but it closes in another way.

    Args:
        transport: of the connection.
        leave: called instead of its ``close``.
    """

    def __init__(self, transport: asyncio.Transport, leave: Callable[[], None]) -> None:
        self.write = transport.write
        self.is_closing = transport.is_closing
        self.close = leave
