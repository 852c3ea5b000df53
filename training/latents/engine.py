"""The engine of one machine: a process per GPU or core, each given one unit after another.

A process that ends before its unit is done is replaced, and the unit given out again. An error that would
come again, such as a full disk, ends the run; files that are there stay whole.
"""

import logging
import multiprocessing
import signal
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess

import torch

from model.errors import ModelError
from training.errors import TrainingError, WorkerError
from training.latents.lanes import Ask, Done, Encoded, Failed, LaneConfig, Message, Ready, run_lane
from training.latents.units import Unit

logger = logging.getLogger(__name__)

MAX_ATTEMPTS = 3
FATAL = (TrainingError, ModelError, OSError, MemoryError, torch.OutOfMemoryError)
"""Errors that another attempt would meet again."""
Event = Ready | Encoded | Done


@dataclass
class _Lane:
    process: BaseProcess
    connection: Connection
    config: LaneConfig
    units: dict[int, Unit] = field(default_factory=dict)
    encoded: dict[int, list[Encoded]] = field(default_factory=dict)
    error: str = ""


class LocalEngine:
    """Runs units on the lanes of this machine.

    Args:
        configs: one per lane.
        units: to be encoded.
    """

    def __init__(self, configs: Sequence[LaneConfig], units: Sequence[Unit]) -> None:
        self.num_lanes = len(configs)
        self._configs = configs
        self._waiting = deque(units)
        self._attempts: dict[int, int] = {}
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["training.latents.lanes"])
        self._lanes: list[_Lane] = []

    @property
    def pids(self) -> list[int]:
        """Processes of the lanes that run now."""
        return [lane.process.pid for lane in self._lanes if lane.process.pid is not None]

    def run(self) -> Generator[Event]:
        """Events of the lanes; what a lost attempt had encoded is taken back by negative numbers.

        Raises:
            WorkerError: a unit's process ended several times.
            TrainingError, ModelError, OSError: the lane's own error.
        """
        try:
            self._lanes = [self._start(config) for config in self._configs]
            while self._lanes:
                ready = wait([lane.connection for lane in self._lanes])
                for lane in [lane for lane in self._lanes if lane.connection in ready]:
                    yield from self._hear(lane)
        finally:
            for lane in self._lanes:
                lane.process.kill()
                lane.process.join()
                lane.connection.close()

    def _start(self, config: LaneConfig) -> _Lane:
        ours, theirs = self._context.Pipe()
        process = self._context.Process(target=run_lane, args=(config, theirs), name=f"lane {config.device}")
        process.start()
        theirs.close()
        return _Lane(process, ours, config)

    def _hear(self, lane: _Lane) -> Iterator[Event]:
        """Take a lane's next message, or its end."""
        try:
            message: Message = lane.connection.recv()
        except (EOFError, ConnectionResetError):
            yield from self._end(lane)
            return
        match message:
            case Ask():
                self._give(lane)
            case Encoded(unit=number):
                lane.encoded.setdefault(number, []).append(message)
                yield message
            case Done(unit=number):
                del lane.units[number]
                lane.encoded.pop(number, None)
                yield message
            case Failed(error=error):
                if isinstance(error, FATAL):
                    raise error
                lane.error = f"{type(error).__name__}: {error}"
            case Ready():
                yield message

    def _give(self, lane: _Lane) -> None:
        unit = self._waiting.popleft() if self._waiting else None
        if unit is not None:
            lane.units[unit.number] = unit
        try:
            lane.connection.send(unit)
        except BrokenPipeError:
            logger.debug("a lane ended while it was given a unit")  # which its end of the pipe will tell

    def _end(self, lane: _Lane) -> Iterator[Event]:
        """A lane ended: start another one if it leaves something undone."""
        lane.process.join()
        lane.connection.close()
        self._lanes.remove(lane)
        for number, messages in lane.encoded.items():
            for message in messages:
                yield Encoded(number, -message.num_images, -message.num_broken)
        why = lane.error or _describe(lane.process.exitcode)
        if lane.units or lane.process.exitcode:
            self._count_attempt(lane, why)
        self._waiting.extendleft(reversed(lane.units.values()))
        if self._waiting:
            logger.warning("a process on %s ended (%s): another one takes its place", lane.config.device, why)
            self._lanes.append(self._start(lane.config))

    def _count_attempt(self, lane: _Lane, why: str) -> None:
        """Blame the unit that the lane was at; raise if it is too often to blame."""
        unit = next(iter(lane.units.values()), None)
        number = -1 if unit is None else unit.number
        self._attempts[number] = self._attempts.get(number, 0) + 1
        if self._attempts[number] < MAX_ATTEMPTS:
            return
        where = f"on {lane.config.device}" if unit is None else f"at {describe_unit(unit)}"
        raise WorkerError(f"{MAX_ATTEMPTS} processes ended {where} ({why}); what is written is whole")


def describe_unit(unit: Unit) -> str:
    """A unit's images, for messages."""
    return f"images {unit.start} to {unit.start + len(unit) - 1} of {unit.input}"


def _describe(status: int | None) -> str:
    if status is None or status >= 0:
        return f"exit status {status}"
    return f"killed by {signal.Signals(-status).name}" + (", perhaps for its memory" if status == -9 else "")
