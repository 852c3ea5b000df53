"""The engine's side of one front: its process, its arena, and its jobs."""

import asyncio
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict
from typing import cast

from service.engine.engine import Engine
from service.engine.queue import Job
from service.engine.state import EngineState
from service.errors import InternalError, ServiceError, UnavailableError, to_fields
from service.processes.children import Frames, share_memory, socket_pair, spawn, wait_or_kill
from service.processes.fronts.memory import Arena, Placed
from service.processes.fronts.messages import Message, facts_to_fields, key_from_fields, pack

logger = logging.getLogger(__name__)

_MODULE = "service"


class FrontLink(asyncio.Protocol):
    """One front; all methods belong to the event loop's thread.

    Args:
        index: of its row in the ledger.
        engine: that computes its jobs.
        arena_bytes: of its arena.
        descriptors: of the listening socket and the ledger, which it inherits.
        environment: further variables of its process.
        render: writes the page of all metrics.
        on_lost: called with this once the process has closed its socket.

    Attributes:
        ready: whether it ever said that it serves.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(
        self,
        index: int,
        engine: Engine,
        arena_bytes: int,
        descriptors: tuple[int, int],
        environment: dict[str, str],
        render: Callable[[], bytes],
        on_lost: Callable[["FrontLink"], None],
    ) -> None:
        self.index = index
        self.ready = False
        self._engine = engine
        self._render = render
        self._on_lost = on_lost
        self._jobs: dict[int, tuple[Job, int]] = {}  # by the front's number, with their places
        self._received = Frames()
        self._transport: asyncio.Transport | None = None
        self._loop = asyncio.get_running_loop()
        self._socket, theirs = socket_pair()
        with theirs:
            arena_fd = share_memory("drorae-front", arena_bytes)
            try:
                self._arena = Arena(arena_fd)
                inherited = (theirs.fileno(), arena_fd, *descriptors)
                self._process = spawn(_MODULE, inherited, (str(index),), **environment)
            except OSError:
                self._socket.close()
                raise
            finally:
                os.close(arena_fd)

    async def connect(self) -> None:
        """Be usable from now on."""
        await self._loop.create_unix_connection(lambda: self, sock=self._socket)
        self.tell_state()

    def tell_state(self) -> None:
        """Tell the front what became of the engine's start."""
        engine = self._engine
        if engine.state is EngineState.READY:
            facts, reasons = facts_to_fields(engine.tokenizer), dict(engine.reasons)
            sizes = {"num_workers": engine.num_workers, "batch_size": engine.batch_size}
            self._send("model", facts=facts, reasons=reasons, **sizes)
        elif engine.state is EngineState.FAILED:
            self._send("failed", broken=engine.broken)

    def stop(self, signal_number: int) -> None:
        """Pass on a signal that the service was given: drain, or at the second one end."""
        self._send("stop", signal=signal_number)

    def kill(self) -> None:
        """End the process now; it is lost once its socket tells so."""
        self._process.kill()

    def end(self) -> int:
        """Wait, in a thread, for a process that has closed its socket and has little time; its status."""
        return wait_or_kill(self._process)

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        """Nobody waits for its jobs any more."""
        for job, _ in list(self._jobs.values()):
            self._engine.cancel(job, UnavailableError("Its front has ended."))
        self._on_lost(self)

    def data_received(self, data: bytes) -> None:
        for message in self._received.feed(data):
            fields = json.loads(message)
            getattr(self, f"_take_{fields.pop('do')}")(fields)

    def _take_ready(self, fields: Message) -> None:
        self.ready = True

    def _take_submit(self, fields: Message) -> None:
        number, inputs = fields["job"], Placed(**fields["inputs"])
        job = Job(key_from_fields(fields["key"]), self._arena.view(inputs).unbind(), fields["deadline_s"])
        self._jobs[number] = job, inputs.at
        job.future.add_done_callback(lambda _: self._loop.call_soon_threadsafe(self._answer, number))
        try:
            self._engine.submit(job)
        except UnavailableError as exc:
            job.fail(exc)

    def _take_cancel(self, fields: Message) -> None:
        if fields["job"] in self._jobs:
            job, _ = self._jobs[fields["job"]]
            self._engine.cancel(job, UnavailableError("Nobody waits for it."), fields["outcome"])

    def _take_page(self, fields: Message) -> None:
        self._send("page", text=self._render().decode())

    def _answer(self, number: int) -> None:
        """Put a job's results where its inputs were, which nobody reads any more."""
        job, at = self._jobs.pop(number)
        job.release()
        outcome: dict[str, object]
        try:
            results = job.future.result()
        except ServiceError as exc:
            outcome = {"error": to_fields(exc)}
        except Exception:  # the job's boundary
            logger.exception("a job failed unexpectedly")
            outcome = {"error": to_fields(InternalError("The model failed on this."))}
        else:
            placed = Placed.like(at, results.shape, results[0])
            self._arena.view(placed).copy_(results)
            outcome = {"results": asdict(placed)}
        self._send("done", job=number, times=asdict(job.times), **outcome)

    def _send(self, do: str, **fields: object) -> None:
        if self._transport is not None and not self._transport.is_closing():
            self._transport.write(pack(do, **fields))
