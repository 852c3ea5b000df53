"""Units of work on a Ray cluster (the extra ``drorae[ray]``), by actors that hold a device each.

Ray starts actors, carries calls, and reports deaths. The rest is here: an actor that died is replaced, and
its units are given out again; an actor that hangs ends itself; an exception in a unit ends the job.
"""

import faulthandler
import logging
import os
import socket
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from threading import Lock
from typing import Any, Generic, TypeVar

import ray
from ray.exceptions import RayError, RayTaskError

from training.errors import ClusterError, WorkerError

logger = logging.getLogger(__name__)

LOCAL = "local"
MAX_ATTEMPTS = 3
"""Per unit, and of getting ready: a machine may go, but a unit may also end every actor that takes it."""
CONNECT_TIMEOUT_S = 10.0
TELL_EVERY_S = 60.0

Unit = TypeVar("Unit")
Result = TypeVar("Result")
Work = Callable[[Unit], Result]


@dataclass(frozen=True)
class Team:
    """Actors that share a job.

    Attributes:
        num_actors: each takes a CPU, and a GPU where the cluster has any.
        units_ahead: units that an actor has beside the one that it works on.
        limit_s: seconds in which an actor must get ready, and then finish one unit after another; one that
            does not ends itself.
    """

    num_actors: int
    units_ahead: int = 0
    limit_s: float = 1800.0


class _Actor(Generic[Unit, Result]):
    """One process of the cluster, and its device."""

    def __init__(self, limit_s: float) -> None:
        self._limit_s = limit_s
        self._lock = Lock()
        self._num_calls = 0
        self._work: Work[Unit, Result] | None = None

    def start(self, build: Callable[[], Work[Unit, Result]]) -> None:
        """Get ready. Not the constructor's work, whose exceptions lose their type."""
        with self._watched():
            self._work = build()

    def do(self, unit: Unit) -> Result:
        """One unit."""
        assert self._work is not None, "start comes first"
        with self._watched():
            return self._work(unit)

    @contextmanager
    def _watched(self) -> Iterator[None]:
        """End the process where no call begins or ends for too long; its log then has the stacks."""
        self._count_calls(1)
        try:
            yield
        finally:
            self._count_calls(-1)

    def _count_calls(self, change: int) -> None:
        with self._lock:
            self._num_calls += change
            faulthandler.cancel_dump_traceback_later()
            if self._num_calls:
                faulthandler.dump_traceback_later(self._limit_s, exit=True)


@contextmanager
def connection(address: str) -> Iterator[None]:
    """A connection to a cluster, or a cluster of this machine alone; one that is open already is kept.

    Args:
        address: ``local``, ``auto`` for the cluster that this machine is part of, or host:port.

    Raises:
        ClusterError: there is none, or it does not let us in.
    """
    _check_reachable(address)
    if ray.is_initialized():
        yield
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_worker_niceness", "0")  # of a local cluster; 15 starves it on a busy machine
    options: dict[str, Any] = {"include_dashboard": False} if address == LOCAL else {}
    try:
        ray.init(address, log_to_driver=False, logging_level=logging.ERROR, **options)
    except (RayError, OSError, ValueError, RuntimeError) as exc:
        hint = "" if address == LOCAL else "; if it asks for a token, set RAY_AUTH_MODE=token here too"
        raise ClusterError(f"no Ray cluster at {address}: {_first_line(exc)}{hint}") from exc
    try:
        yield
    finally:
        ray.shutdown()


def cluster_resources() -> tuple[int, int]:
    """CPUs and GPUs of the cluster."""
    resources = ray.cluster_resources()
    return max(1, int(resources.get("CPU", 1))), int(resources.get("GPU", 0))


def _check_reachable(address: str) -> None:
    """Ray itself tries for minutes, and then ends the process."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdecimal():
        return
    try:
        socket.create_connection((host, int(port)), timeout=CONNECT_TIMEOUT_S).close()
    except (OSError, OverflowError) as exc:
        raise ClusterError(f"no Ray cluster at {address}: {exc}") from exc


def work_on_ray(
    build: Callable[[], Work[Unit, Result]], units: Sequence[Unit], team: Team
) -> Iterator[Result]:
    """Results of units, in the order in which they are finished. A unit may be computed more than once.

    Args:
        build: called once per actor, there; gives the function that computes a unit, in several threads
            where actors have units ahead. Pickled, as are units and results.
        units: their ``str`` tells which one it is.
        team: the actors.

    Raises:
        WorkerError: a unit, or getting ready, ended `MAX_ATTEMPTS` actors.
        Exception: ``build`` or a unit raised it.
    """
    job = _Job(build, units, team)
    try:
        yield from job.results()
    finally:
        job.end()


@dataclass(frozen=True)
class _Call:
    """A call in flight: to get ready, or of the unit at an index."""

    actor: Any
    unit: int | None


class _Job(Generic[Unit, Result]):
    """Units that wait, and calls in flight, in the order in which they were made."""

    def __init__(self, build: Callable[[], Work[Unit, Result]], units: Sequence[Unit], team: Team) -> None:
        self.units = units
        self.team = team
        self.build = ray.put(build)
        self.waiting = deque(range(len(units)))
        self.calls: dict[Any, _Call] = {}
        self.attempts: Counter[int | None] = Counter()
        _, num_gpus = cluster_resources()
        self.num_actors = min(team.num_actors, len(units))
        self.actor_class: Any = ray.remote(_Actor).options(
            num_cpus=1, num_gpus=min(1, num_gpus), max_concurrency=1 + team.units_ahead
        )

    def results(self) -> Iterator[Result]:
        """Results as they come; until then, whatever happens to the actors."""
        for _ in range(self.num_actors):
            self._start_actor()
        while self.waiting or any(call.unit is not None for call in self.calls.values()):
            done, _ = ray.wait(list(self.calls), num_returns=1, timeout=TELL_EVERY_S)
            if not done:
                self._tell_who_waits()
                continue
            call = self.calls[done[0]]
            try:
                result = ray.get(done[0])
            except RayTaskError as exc:
                raise (exc.cause or exc) from exc
            except RayError as exc:
                self._replace(call.actor, exc)
                continue
            del self.calls[done[0]]
            if call.unit is None:
                self.attempts[None] = 0
                for _ in range(1 + self.team.units_ahead):
                    self._give_unit(call.actor)
            else:
                self._give_unit(call.actor)
                yield result

    def end(self) -> None:
        """Let every actor go, whatever it does."""
        for call in self.calls.values():
            ray.kill(call.actor)
        self.calls.clear()

    def _start_actor(self) -> None:
        actor = self.actor_class.remote(self.team.limit_s)
        self.calls[actor.start.remote(self.build)] = _Call(actor, None)

    def _give_unit(self, actor: Any) -> None:
        """The next unit; an actor that has none ends with its last call, and gives its device back."""
        if self.waiting:
            index = self.waiting.popleft()
            self.calls[actor.do.remote(self.units[index])] = _Call(actor, index)

    def _replace(self, actor: Any, exc: RayError) -> None:
        """Start another actor for one that ended, which is held against the call that it was at."""
        lost = [reference for reference, call in self.calls.items() if call.actor is actor]
        units = [self.calls.pop(reference).unit for reference in lost]
        what = "getting ready" if units[0] is None else str(self.units[units[0]])
        self.attempts[units[0]] += 1
        if self.attempts[units[0]] >= MAX_ATTEMPTS:
            raise WorkerError(
                f"{what}: ended {MAX_ATTEMPTS} actors, the last one so: {_first_line(exc)} The logs below "
                "/tmp/ray/session_latest/logs on its machine have more."
            ) from exc
        logger.warning("%s: its actor ended, and another one takes its place: %s", what, _first_line(exc))
        ray.kill(actor)
        self.waiting.extendleft(unit for unit in reversed(units) if unit is not None)
        self._start_actor()

    def _tell_who_waits(self) -> None:
        if all(call.unit is None for call in self.calls.values()):
            free = {name: ray.available_resources().get(name, 0) for name in ("CPU", "GPU")}
            logger.warning("no actor is ready yet; the cluster has %(CPU)g CPUs and %(GPU)g GPUs free", free)


def _first_line(exc: BaseException) -> str:
    lines = [line.strip() for line in str(exc).splitlines() if line.strip()]
    return lines[0] if lines else type(exc).__name__
