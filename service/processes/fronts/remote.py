"""The engine as a front has it: jobs go to the engine's process, through the arena and the socket."""

import asyncio
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import cast

from service.engine.queue import Job, JobTimes
from service.engine.rates import Rates
from service.engine.state import EngineState, Stages
from service.errors import QueueFullError, UnavailableError, from_fields
from service.processes.children import Frames
from service.processes.fronts.memory import Arena, Placed
from service.processes.fronts.messages import Facts, Message, facts_from_fields, key_to_fields, pack

_PAGE_S = 5.0  # for the engine's process to write the metrics


class RemoteEngine(Stages, asyncio.Protocol):
    """What requests see as the engine; everything belongs to the event loop's thread.

    A job's place in the arena stays taken until the engine is done with it, also where nobody waits any more.

    Args:
        rates: as the engine measures them.
        arena: for jobs.
        retry_after_s: sent while it takes no work.
        on_stop: called with the number of a signal that the service was given.
        on_lost: called when the engine's process has gone.

    Attributes:
        rates, broken, reasons, num_workers, batch_size: as of `service.engine.engine.Engine`.
    """

    def __init__(
        self,
        rates: Rates,
        arena: Arena,
        retry_after_s: int,
        on_stop: Callable[[int], None],
        on_lost: Callable[[], None],
    ) -> None:
        super().__init__(retry_after_s)
        self.rates = rates
        self.reasons: Mapping[str, str] = {}
        self.num_workers = 0
        self.batch_size = 0
        self._arena = arena
        self._on_stop, self._on_lost = on_stop, on_lost
        self._facts: Facts | None = None
        self._jobs: dict[int, tuple[Job, int]] = {}  # by number, with their places
        self._numbers: dict[Job, int] = {}
        self._num_jobs = 0
        self._pages: list[asyncio.Future[bytes]] = []
        self._received = Frames()
        self._transport: asyncio.Transport | None = None

    @property
    def tokenizer(self) -> Facts:
        """The facts of the model.

        Raises:
            UnavailableError: it is still loading, or could not be loaded.
        """
        if self._facts is None:
            raise self.unavailable()
        return self._facts

    def start(self) -> None:
        """Tell that this front serves; the engine itself began long ago."""
        self._send("ready")

    def submit(self, job: Job) -> None:
        """Send an admitted job, also while draining.

        Raises:
            UnavailableError: not loaded, or failed.
            QueueFullError: no room in the arena.
        """
        if self._state not in (EngineState.READY, EngineState.DRAINING) or self._facts is None:
            raise self.unavailable()
        inputs = [ticket.tensor for ticket in job.tickets]
        result_bytes = len(inputs) * job.key.operation.result_bytes(self._facts.config)
        at = self._arena.take(max(sum(tensor.nbytes for tensor in inputs), result_bytes))
        if at is None:
            raise QueueFullError(
                "The memory before the engine is full.", {"Retry-After": str(self._retry_after_s)}
            )
        placed = Placed.like(at, (len(inputs), *inputs[0].shape), inputs[0])
        for place, tensor in zip(self._arena.view(placed), inputs, strict=True):
            place.copy_(tensor)
        self._num_jobs += 1
        self._jobs[self._num_jobs], self._numbers[job] = (job, at), self._num_jobs
        key, inputs_fields = key_to_fields(job.key), asdict(placed)
        self._send("submit", job=self._num_jobs, key=key, inputs=inputs_fields, deadline_s=job.deadline_s)

    def cancel(self, job: Job, error: Exception, outcome: str = "cancelled") -> None:
        """Take a job back; as `Engine.cancel`."""
        job.fail(error)
        number = self._numbers.get(job)
        if number is not None:
            self._send("cancel", job=number, outcome=outcome)

    def start_draining(self) -> None:
        """Be unready; admitted jobs are still taken."""
        if self._state in (EngineState.LOADING, EngineState.READY):
            self._state = EngineState.DRAINING

    def fail_jobs(self, error: UnavailableError) -> None:
        """Settle every job of this front that is not settled yet with an error."""
        for job in list(self._numbers):
            self.cancel(job, error, "failed")

    async def metrics_page(self) -> bytes:
        """All metrics, of all processes, in Prometheus' text format.

        Raises:
            UnavailableError: the engine's process is too busy to write them.
        """
        page: asyncio.Future[bytes] = asyncio.get_running_loop().create_future()
        self._pages.append(page)
        self._send("page")
        try:
            async with asyncio.timeout(_PAGE_S):
                return await page
        except TimeoutError:
            raise self.unavailable() from None

    def close(self, timeout_s: float) -> None:
        """Its own process ends it."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        self._on_lost()

    def data_received(self, data: bytes) -> None:
        for message in self._received.feed(data):
            fields = json.loads(message)
            getattr(self, f"_take_{fields.pop('do')}")(fields)

    def _take_model(self, fields: Message) -> None:
        self._facts = facts_from_fields(fields["facts"])
        self.reasons = fields["reasons"]
        self.num_workers, self.batch_size = fields["num_workers"], fields["batch_size"]
        if self._state is EngineState.LOADING:
            self._state = EngineState.READY

    def _take_done(self, fields: Message) -> None:
        """A job is settled; whoever waits for it has its result copied, since its place is given back."""
        job, at = self._jobs.pop(fields["job"])
        del self._numbers[job]
        if not job.settled:
            job.times = JobTimes(**fields["times"])
            if "error" in fields:
                job.fail(from_fields(fields["error"]))
            else:
                job.future.set_result(self._arena.view(Placed(**fields["results"])).clone())
        self._arena.give_back(at)

    def _take_page(self, fields: Message) -> None:
        page = self._pages.pop(0)
        if not page.done():
            page.set_result(fields["text"].encode())

    def _take_failed(self, fields: Message) -> None:
        self.broken = fields["broken"]
        self._state = EngineState.FAILED

    def _take_stop(self, fields: Message) -> None:
        self._on_stop(fields["signal"])

    def _send(self, do: str, **fields: object) -> None:
        assert self._transport is not None
        self._transport.write(pack(do, **fields))
