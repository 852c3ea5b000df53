"""The watchdog: for how long threads have been at something without getting on.

A clock alone cannot tell: a process that was stopped, or that shares its CPUs with too many others, is slow
and not hung. So time is counted as follows.

- None for which a thread of the process was ready to run and others had the CPUs.
- A tenth of the time for which a thread computes whose work is the CPU's: it gets on, and only a loop
  without end reaches a limit so. A thread that waits for a GPU may spin, which proves nothing.
- All else: the thread sleeps.
- After a pause of the whole process all is counted anew.
"""

import os
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

OVERSLEPT_S = 2.0
"""A watchdog that is so late was stopped itself (SIGSTOP, a machine that was suspended), or got no CPU."""
_COMPUTING_COUNTS = 0.1
_TASKS = Path("/proc/self/task")
_NOTHING = (0.0, 0.0)


class Watched(Protocol):
    """A thread at work.

    Attributes:
        name, native_id: as of `threading.Thread`.
        busy_since_s: begin of its current work, on the clock of `time.monotonic`; None while it is idle.
        computes: whether its work is the CPU's.
    """

    @property
    def name(self) -> str: ...
    @property
    def native_id(self) -> int | None: ...
    @property
    def busy_since_s(self) -> float | None: ...
    @property
    def computes(self) -> bool: ...


Usage = Mapping[int, tuple[float, float]]
"""Seconds that each thread of the process has run, and seconds that it was ready and had no CPU."""


@dataclass
class _Count:
    """A thread's work, as of the last look at it.

    Attributes:
        since_s: which piece of work.
        usage: at the last look; None at the first one, since most work is over before the second.
        counted_s: time counted so far.
    """

    since_s: float
    usage: Usage | None = None
    counted_s: float = 0.0


class Watchdog:
    """Counts, look by look, how long threads have been busy without getting on."""

    def __init__(self) -> None:
        self._looked_s = time.monotonic()
        self._counts: dict[int, _Count] = {}

    def look(self, threads: Iterable[Watched]) -> None:
        """Count the time since the last look. Call it several times per second."""
        now_s = time.monotonic()
        passed_s, self._looked_s = now_s - self._looked_s, now_s
        if passed_s > OVERSLEPT_S:
            self._counts.clear()
        counts: dict[int, _Count] = {}
        usage: Usage | None = None
        for thread in threads:
            since_s, task = thread.busy_since_s, thread.native_id
            if since_s is None or task is None:
                continue
            before, counts[task] = self._counts.get(task), _Count(since_s)
            if before is None or before.since_s != since_s:
                continue
            usage = usage or read_usage()
            counts[task].usage, counts[task].counted_s = usage, before.counted_s
            if before.usage is not None:
                counts[task].counted_s += _owed_s(task, before.usage, usage, passed_s, thread.computes)
        self._counts = counts

    def counted_s(self, thread: Watched) -> float:
        """Counted time of a thread's current work, seconds; 0 while it is idle."""
        count = self._counts.get(thread.native_id or 0)
        return 0.0 if count is None or count.since_s != thread.busy_since_s else count.counted_s


def _owed_s(task: int, before: Usage, now: Usage, passed_s: float, computes: bool) -> float:
    ran_s = now.get(task, _NOTHING)[0] - before.get(task, _NOTHING)[0]
    ran_counts_s = ran_s * (_COMPUTING_COUNTS if computes else 1.0)
    if is_runnable(task):
        return ran_counts_s
    # A thread that sleeps may wait for others of its team, which have no CPU.
    waited_s = max((now[other][1] - before.get(other, now[other])[1] for other in now), default=0.0)
    return ran_counts_s + max(0.0, passed_s - ran_s - waited_s)


def is_runnable(task: int) -> bool:
    """Whether a thread of this process runs or only wants a CPU; False where the system does not tell."""
    try:
        stat = (_TASKS / str(task) / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "R"


def read_usage() -> Usage:
    """Usage of the threads of this process; empty where the system does not tell."""
    usage: dict[int, tuple[float, float]] = {}
    try:
        tasks = os.listdir(_TASKS)
    except OSError:
        return usage
    for task in tasks:
        try:
            ran, waited, _ = (_TASKS / task / "schedstat").read_text(encoding="ascii").split()
        except (OSError, ValueError):  # it has ended
            continue
        usage[int(task)] = (int(ran) / 1e9, int(waited) / 1e9)
    return usage
