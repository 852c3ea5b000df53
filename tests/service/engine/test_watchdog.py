"""The watchdog: what it counts of a thread's time, on a clock and a scheduler of the test's."""

import threading
from dataclasses import dataclass
from types import SimpleNamespace

import pytest

from service.engine import watchdog
from service.engine.watchdog import OVERSLEPT_S, Watchdog

TASK, TEAMMATE = 7, 8
LOOK_S = 0.2


@dataclass
class Work:
    """A thread that is at something."""

    name: str = "drorae-cpu:0"
    native_id: int | None = TASK
    busy_since_s: float | None = 1.0
    computes: bool = True


class System:
    """What the operating system says, after looks in which threads ran, waited for a CPU, or slept."""

    def __init__(self) -> None:
        self.now_s = 100.0
        self.usage = {TASK: (0.0, 0.0), TEAMMATE: (0.0, 0.0)}
        self.runnable = False
        self.dog = Watchdog()

    def pass_time(self, seconds: float, ran: float = 0.0, waited: float = 0.0, teammate: float = 0.0) -> None:
        """Let time pass, of which the thread ran a part, and it or a teammate had no CPU for a part."""
        self.now_s += seconds
        parts = {TASK: (ran, waited), TEAMMATE: (0.0, teammate)}
        self.usage = {
            task: (before[0] + parts[task][0] * seconds, before[1] + parts[task][1] * seconds)
            for task, before in self.usage.items()
        }

    def count(self, work: Work, seconds: float, runnable: bool = False, **parts: float) -> float:
        """Seconds counted at the end of so many, in which the watchdog looks as it should."""
        self.runnable = runnable
        for _ in range(round(seconds / LOOK_S)):
            self.pass_time(LOOK_S, **parts)
            self.dog.look([work])
        return self.dog.counted_s(work)


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch) -> System:
    told = System()
    monkeypatch.setattr(watchdog, "time", SimpleNamespace(monotonic=lambda: told.now_s))
    monkeypatch.setattr(watchdog, "read_usage", lambda: told.usage)
    monkeypatch.setattr(watchdog, "is_runnable", lambda _: told.runnable)
    told.dog = Watchdog()
    return told


@pytest.mark.parametrize("computes", [True, False])
def test_a_thread_that_sleeps_is_counted_by_the_clock(system: System, computes: bool) -> None:
    assert system.count(Work(computes=computes), 10) == pytest.approx(10, abs=0.5)


def test_a_thread_that_computes_gets_on(system: System) -> None:
    assert system.count(Work(), 10, runnable=True, ran=1.0) == pytest.approx(1, abs=0.1)


def test_a_loop_without_end_is_found_in_the_end(system: System) -> None:
    assert system.count(Work(), 100, runnable=True, ran=1.0) > 9


def test_a_host_thread_that_spins_for_a_gpu_does_not_get_on(system: System) -> None:
    assert system.count(Work(computes=False), 10, runnable=True, ran=1.0) == pytest.approx(10, abs=0.5)


@pytest.mark.parametrize("computes", [True, False])
@pytest.mark.parametrize("ran", [0.0, 0.05])
def test_a_thread_without_a_cpu_is_not_counted(system: System, computes: bool, ran: float) -> None:
    """Whether the system has told of the wait so far, or will once it is over."""
    assert system.count(Work(computes=computes), 10, runnable=True, ran=ran) < 1
    assert system.count(Work(computes=computes), 10, ran=ran, waited=1 - ran) < 2


def test_a_thread_that_sleeps_for_teammates_without_a_cpu_is_not_counted(system: System) -> None:
    assert system.count(Work(), 10, ran=0.1, teammate=0.9) < 1


def test_a_pause_of_the_process_begins_the_count_anew(system: System) -> None:
    work = Work()
    assert system.count(work, 5) > 4
    system.pass_time(OVERSLEPT_S + 100)
    system.dog.look([work])
    assert system.dog.counted_s(work) == 0
    assert system.count(work, 1) < 1
    assert system.count(work, 5) > 5


def test_each_piece_of_work_is_counted_by_itself(system: System) -> None:
    work = Work()
    assert system.count(work, 5) > 4
    work.busy_since_s = 2.0
    assert system.dog.counted_s(work) == 0
    assert system.count(work, 1) < 1
    work.busy_since_s = None
    assert system.count(work, 5) == 0


def test_where_the_system_tells_nothing_the_clock_decides(
    system: System, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(watchdog, "read_usage", dict)
    assert system.count(Work(), 10) == pytest.approx(10, abs=0.5)


def test_linux_tells_a_thread_that_sleeps_from_one_that_runs() -> None:
    """The real files: this thread runs and has run; another one waits."""
    entered, gate = threading.Event(), threading.Event()
    sleeping = threading.Thread(target=lambda: (entered.set(), gate.wait(60)))
    sleeping.start()
    entered.wait(60)
    try:
        this, other = threading.get_native_id(), sleeping.native_id
        assert other is not None
        usage = watchdog.read_usage()
        if this not in usage:
            pytest.skip("this system keeps no statistics of its scheduler")
        assert watchdog.is_runnable(this)
        assert usage[this][0] > usage[other][0]
    finally:
        gate.set()
        sleeping.join()
    assert not watchdog.is_runnable(2**22 + 1), "no such thread"
