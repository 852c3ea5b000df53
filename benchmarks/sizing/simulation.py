"""A discrete-event model of the service on one machine.

Work is done by stations: the interpreter of the service's process (the event loop and the engine's Python,
one thread at a time), the fronts where there are several, whose interpreters take over the event loop's part,
the decoder processes, the threads that write pictures, and the engines. All work but a GPU's needs a core;
where more works than there are cores, all go slower alike. Costs are constants, so
whatever is random comes from the arrivals.
"""

import heapq
import itertools
import math
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

Action = Callable[[], None]


@dataclass(frozen=True)
class BatchCost:
    """Time of a batch: seconds that it takes of itself, and for each item."""

    fixed_s: float
    item_s: float

    def seconds(self, num_items: int) -> float:
        """Of a batch of so many."""
        return self.fixed_s + num_items * self.item_s


@dataclass(frozen=True)
class Costs:
    """What a request takes, seconds of one core or of the device.

    Attributes:
        request_s: of the engine's process, per request.
        item_s: of the engine's process, per image.
        front_request_s, front_item_s: of a front, where there are several; the two above are then of what is
            left to the engine's process.
        decode_s: of a decoder, per image; 0 for tensors.
        picture_s: of a thread that writes an answer's picture, per image; 0 for latents.
        batch: of the device, or of the core that computes.
        client_s: of the client's process, per request, where it shares the cores; else 0.
    """

    request_s: float
    item_s: float
    decode_s: float
    picture_s: float
    batch: BatchCost
    client_s: float = 0.0
    front_request_s: float = 0.0
    front_item_s: float = 0.0


@dataclass(frozen=True)
class Machine:
    """What the service runs on, and how it is set.

    Attributes:
        num_cores: of the machine.
        num_decoders: decoder processes.
        num_engines: GPUs, or batches that a CPU computes side by side.
        batch_size: most items of a batch.
        computes: whether engines need a core each: a CPU's do.
        depth: batches that an engine has in flight.
        num_writers: threads that write pictures.
        num_fronts: processes that accept requests; where it is one, it is the engine's.
    """

    num_cores: int
    num_decoders: int
    num_engines: int = 1
    batch_size: int = 64
    computes: bool = False
    depth: int = 2
    num_writers: int = 8
    num_fronts: int = 1


@dataclass(frozen=True)
class Traffic:
    """What is asked for.

    Attributes:
        clients: of a closed loop, each with one request in flight; 0 for arrivals at random.
        requests_per_s: mean rate of arrivals that do not wait for answers (Poisson).
        images_per_request: of each.
    """

    clients: int = 0
    requests_per_s: float = 0.0
    images_per_request: int = 1


@dataclass(frozen=True)
class Outcome:
    """What the model says.

    Attributes:
        images_per_s: answered.
        p50_ms, p99_ms: from arrival to answer, milliseconds.
        busy: shares of the time that stations work, by their names; ``cores`` of all cores together.
    """

    images_per_s: float
    p50_ms: float
    p99_ms: float
    busy: dict[str, float]

    @property
    def bottleneck(self) -> str:
        """The station that works most of the time."""
        return max(self.busy, key=lambda name: self.busy[name])


def simulate(
    machine: Machine, costs: Costs, traffic: Traffic, num_requests: int = 4000, seed: int = 0
) -> Outcome:
    """Run so many requests; the first fifth fills the queues and does not count."""
    return _Service(machine, costs, traffic, random.Random(seed)).run(num_requests)


class _Clock:
    """Time, what happens when, and the cores, which share themselves out among all that works on them."""

    def __init__(self, num_cores: int) -> None:
        self.now_s = 0.0
        self.core_s = 0.0
        """Work that the cores did."""
        self._num_cores = num_cores
        self._ids = itertools.count()
        self._events: list[tuple[float, int, Action]] = []
        self._work: list[tuple[float, int, Action]] = []  # by the share of a core at which it is done
        self._shared_s = 0.0  # that each of the working has had since the start

    def after(self, delay_s: float, action: Action) -> None:
        """Call later; takes no core."""
        heapq.heappush(self._events, (self.now_s + delay_s, next(self._ids), action))

    def work(self, duration_s: float, action: Action) -> None:
        """Call once a core has worked so long."""
        heapq.heappush(self._work, (self._shared_s + duration_s, next(self._ids), action))

    def step(self) -> None:
        """Go to the next thing that happens."""
        rate = min(1.0, self._num_cores / len(self._work)) if self._work else 1.0
        done_s = self.now_s + (self._work[0][0] - self._shared_s) / rate if self._work else math.inf
        event_s = self._events[0][0] if self._events else math.inf
        elapsed_s = min(done_s, event_s) - self.now_s
        self.now_s += elapsed_s
        self._shared_s += elapsed_s * rate
        self.core_s += elapsed_s * rate * len(self._work)
        heap = self._work if done_s <= event_s else self._events
        heapq.heappop(heap)[2]()


class _Station:
    """Servers with one queue, first in, first out; each works on a core."""

    def __init__(self, clock: _Clock, num_servers: int) -> None:
        self.busy_s = 0.0
        """Of all servers together, as long as the work took them."""
        self.num_servers = num_servers
        self._clock = clock
        self._num_idle = num_servers
        self._waiting: deque[tuple[float, Action]] = deque()

    def submit(self, duration_s: float, action: Action) -> None:
        """Call once the work is done; work of no duration is done at once."""
        if duration_s <= 0:
            action()
            return
        self._waiting.append((duration_s, action))
        self._start()

    def _start(self) -> None:
        if not self._waiting or not self._num_idle:
            return
        self._num_idle -= 1
        duration_s, action = self._waiting.popleft()
        begin_s = self._clock.now_s

        def end() -> None:
            self._num_idle += 1
            self.busy_s += self._clock.now_s - begin_s
            action()
            self._start()

        self._clock.work(duration_s, end)


@dataclass
class _Request:
    arrived_s: float
    missing: int


@dataclass
class _Engine:
    """An engine's thread, and when its device has done all that it was given."""

    flights: deque[list[_Request]] = field(default_factory=deque)
    free_s: float = 0.0
    waits: bool = False


class _Service:
    def __init__(self, machine: Machine, costs: Costs, traffic: Traffic, random_: random.Random) -> None:
        self.machine, self.costs, self.traffic, self.random = machine, costs, traffic, random_
        self.clock = _Clock(machine.num_cores)
        self.interpreter = _Station(self.clock, 1)
        each = traffic.images_per_request
        engine_s = costs.request_s + each * costs.item_s
        if machine.num_fronts > 1:
            self.fronts = _Station(self.clock, machine.num_fronts)
            self.front_s, self.engine_s = costs.front_request_s + each * costs.front_item_s, engine_s
        else:
            self.fronts, self.front_s, self.engine_s = self.interpreter, engine_s, 0.0
        self.decoders = _Station(self.clock, machine.num_decoders)
        self.writers = _Station(self.clock, machine.num_writers)
        self.client = _Station(self.clock, 1)
        self.engines = [_Engine() for _ in range(machine.num_engines)]
        self.engines_s = 0.0
        self.queue: deque[_Request] = deque()
        self.durations_s: list[float] = []
        self.num_answered = 0

    def run(self, num_requests: int) -> Outcome:
        self._begin()
        self._until(num_requests // 5)
        begin = self._figures()
        self.durations_s.clear()
        self._until(num_requests)
        spent = {name: value - begin[name] for name, value in self._figures().items()}
        elapsed_s = spent.pop("elapsed")
        servers = {
            "interpreter": 1,
            "fronts": self.machine.num_fronts,
            "decoders": self.decoders.num_servers,
            "writers": self.writers.num_servers,
            "engines": len(self.engines),
            "cores": self.machine.num_cores,
        }
        ordered = sorted(self.durations_s)
        return Outcome(
            len(ordered) * self.traffic.images_per_request / elapsed_s,
            1e3 * ordered[len(ordered) // 2],
            1e3 * ordered[int(0.99 * len(ordered))],
            {name: spent[name] / count / elapsed_s for name, count in servers.items()},
        )

    def _figures(self) -> dict[str, float]:
        return {
            "elapsed": self.clock.now_s,
            "interpreter": self.interpreter.busy_s,
            "fronts": self.fronts.busy_s,
            "decoders": self.decoders.busy_s,
            "writers": self.writers.busy_s,
            "engines": self.engines_s,
            "cores": self.clock.core_s,
        }

    def _until(self, num_answered: int) -> None:
        while self.num_answered < num_answered:
            self.clock.step()

    def _begin(self) -> None:
        if not self.traffic.clients:
            self._arrive_at_random()
        for _ in range(self.traffic.clients):
            self.client.submit(self.costs.client_s / 2, self._arrive)

    def _arrive_at_random(self) -> None:
        def arrive() -> None:
            self._arrive()
            self._arrive_at_random()

        self.clock.after(self.random.expovariate(self.traffic.requests_per_s), arrive)

    def _arrive(self) -> None:
        """Half of the Python work comes before the model's."""
        request = _Request(self.clock.now_s, self.traffic.images_per_request)
        self.fronts.submit(self.front_s / 2, lambda: self._decode(request))

    def _decode(self, request: _Request) -> None:
        """A request's images are queued together, when all are decoded."""
        missing = itertools.count(request.missing - 1, -1)

        def queue() -> None:
            self.queue.extend([request] * request.missing)
            self._wake()

        def decoded() -> None:
            if next(missing) == 0:
                self.interpreter.submit(self.engine_s / 2, queue)

        for _ in range(request.missing):
            self.decoders.submit(self.costs.decode_s, decoded)

    def _wake(self) -> None:
        for engine in self.engines:
            if self.queue and not engine.waits and not engine.flights:
                self._launch(engine, math.ceil(len(self.queue) / len(self.engines)))

    def _launch(self, engine: _Engine, num_items: int) -> None:
        """Give the engine a batch, and another one if that is full; then its thread waits for the first."""
        size = self.machine.batch_size
        batch = [self.queue.popleft() for _ in range(min(size, num_items))]
        engine.flights.append(batch)
        seconds = self.costs.batch.seconds(len(batch))
        if self.machine.computes:
            engine.waits = True
            begin_s = self.clock.now_s

            def computed() -> None:
                self.engines_s += self.clock.now_s - begin_s
                self._end(engine)

            self.clock.work(seconds, computed)
            return
        engine.free_s = max(engine.free_s, self.clock.now_s) + seconds
        if len(engine.flights) < self.machine.depth and len(self.queue) >= size:
            self._launch(engine, size)
        if not engine.waits:
            self._await(engine)

    def _await(self, engine: _Engine) -> None:
        engine.waits = True
        later = sum(self.costs.batch.seconds(len(batch)) for batch in list(engine.flights)[1:])
        self.clock.after(max(0.0, engine.free_s - later - self.clock.now_s), lambda: self._end(engine))

    def _end(self, engine: _Engine) -> None:
        batch = engine.flights.popleft()
        engine.waits = False
        if not self.machine.computes:
            self.engines_s += self.costs.batch.seconds(len(batch))
        for request in batch:
            request.missing -= 1
            if not request.missing:
                self._write(request)
        if len(self.queue) >= self.machine.batch_size:
            self._launch(engine, self.machine.batch_size)
        elif engine.flights:
            self._await(engine)
        else:
            self._wake()

    def _write(self, request: _Request) -> None:
        """Pictures are written in threads of the process that has the connection."""
        seconds = self.traffic.images_per_request * self.costs.picture_s

        def answer() -> None:
            self.fronts.submit(self.front_s / 2, lambda: self._answer(request))

        self.interpreter.submit(self.engine_s / 2, lambda: self.writers.submit(seconds, answer))

    def _answer(self, request: _Request) -> None:
        self.num_answered += 1
        self.durations_s.append(self.clock.now_s - request.arrived_s)
        if self.traffic.clients:
            self.client.submit(self.costs.client_s, self._arrive)
