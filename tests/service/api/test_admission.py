"""Room: what does not fit is refused at once; it is given back whatever happens."""

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from service.api.admission import SMALL_BYTES, Admission, Reservation
from service.engine import operations
from service.engine.rates import Rates
from service.errors import QueueFullError
from service.processes.tally import Tally
from service.settings import Settings
from service.telemetry.metrics import Metrics

FAR_S = float("inf")
ENCODE = operations.ENCODE


def admission(rates: Rates | None = None, num_workers: int = 1, **settings: Any) -> Admission:
    engine: Any = SimpleNamespace(rates=rates or Rates(), num_workers=num_workers)
    defaults = {"queue_limit_items": 10, "max_items_per_request": 10}
    return Admission(Settings(**{**defaults, **settings}), engine, Metrics(), Tally())


def pending(room: Admission) -> tuple[float | None, float | None]:
    registry = room._metrics.registry
    return tuple(registry.get_sample_value(f"drorae_pending_{name}") for name in ("items", "bytes"))


@contextmanager
def held(
    room: Admission, num_items: int = 1, num_bytes: int = 0, deadline_s: float = FAR_S
) -> Iterator[Reservation]:
    with room.admit(ENCODE, num_items, deadline_s) as place:
        place.hold_items(num_items)
        place.hold_bytes(num_bytes)
        yield place


def test_room_is_given_back_even_after_an_error() -> None:
    room = admission()

    def answer() -> None:
        with held(room, 4, 1000):
            assert pending(room) == (4, 1000)
            assert room.num_requests == 1
            raise KeyError

    with pytest.raises(KeyError):
        answer()
    assert pending(room) == (0, 0)
    assert room.num_requests == 0


def test_items_are_held_whole_or_not_at_all() -> None:
    room = admission()
    with held(room, 7) as place:
        with pytest.raises(QueueFullError, match=r"7 of at most 10 items .* and 4 more came"):
            room.admit(ENCODE, 4, FAR_S)
        with held(room, 3):
            assert pending(room) == (10, 0)
        place.hold_items(2)
        with held(room, 5), pytest.raises(QueueFullError, match="and 4 more came"):
            place.hold_items(6)
        assert pending(room) == (2, 0)


def test_a_request_that_is_admitted_holds_nothing_yet() -> None:
    room = admission()
    with room.admit(ENCODE, 10, FAR_S), held(room, 10):
        assert pending(room) == (10, 0)


def test_bytes_are_bounded_and_given_back_early() -> None:
    room = admission(queue_limit_bytes=2000, max_body_bytes=2000)
    with held(room, 1, 1500) as place:
        with held(room) as other:
            with pytest.raises(QueueFullError, match="1500 of at most 2000 bytes"):
                other.hold_bytes(501)
            other.hold_bytes(500)
            with pytest.raises(QueueFullError, match="and 1 more came"):
                place.hold_bytes(1501)
        place.hold_bytes(200)
        with held(room, 1, 1800):
            assert pending(room) == (2, 2000)


def test_large_requests_leave_room_for_small_ones() -> None:
    limit = 16 * SMALL_BYTES
    room = admission(queue_limit_bytes=limit, max_body_bytes=limit)
    with held(room, 1, 8 * SMALL_BYTES), held(room) as second:
        second.hold_bytes(4 * SMALL_BYTES)
        with pytest.raises(QueueFullError):
            second.hold_bytes(4 * SMALL_BYTES + 1)
        with held(room, 1, SMALL_BYTES):
            assert pending(room) == (3, 13 * SMALL_BYTES)


def test_a_request_alone_has_the_room_that_it_needs() -> None:
    room = admission(queue_limit_bytes=2000, max_body_bytes=2000)
    with held(room, 1, 2000) as place:
        place.hold_bytes(5000)
        with pytest.raises(QueueFullError), held(room, 1, 1):
            pass
    assert pending(room) == (0, 0)


def test_bytes_are_held_while_a_thread_works_on() -> None:
    room = admission()
    work: Future[None] = Future()

    async def leave() -> None:
        with held(room, 1, 1000) as place:
            place.keep_until_done(work)
        assert pending(room) == (0, 1000)
        assert room.num_requests == 0
        work.set_result(None)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert pending(room) == (0, 0)

    asyncio.run(leave())


def test_retry_after_follows_from_the_measured_rate() -> None:
    rates = Rates()
    for _ in range(200):
        rates.record(ENCODE, 4, 10.0)
    one_engine = admission(rates)
    with held(one_engine, 10), pytest.raises(QueueFullError) as caught:
        one_engine.admit(ENCODE, 1, FAR_S)
    assert caught.value.headers == {"Retry-After": "25"}
    two_engines = admission(rates, num_workers=2)
    with held(two_engines, 10), pytest.raises(QueueFullError) as caught:
        two_engines.admit(ENCODE, 1, FAR_S)
    assert caught.value.headers == {"Retry-After": "13"}
    unmeasured = admission(retry_after_s=3)
    with held(unmeasured, 10), pytest.raises(QueueFullError) as caught:
        unmeasured.admit(ENCODE, 1, FAR_S)
    assert caught.value.headers == {"Retry-After": "3"}


def test_rates_follow_the_newest_batches() -> None:
    rates = Rates()
    rates.record(ENCODE, 1, 1.0)
    for _ in range(100):
        rates.record(ENCODE, 2, 6.0)
    assert rates.duration_s({ENCODE: 1}, 1) == pytest.approx(3.0, rel=1e-3)
    assert rates.duration_s({operations.DECODE: 5}, 1) == 0.0


def test_a_deadline_that_the_backlog_outlasts_is_refused() -> None:
    rates = Rates()
    rates.record(ENCODE, 1, 2.0)
    room = admission(rates)
    with held(room, 3):
        with pytest.raises(QueueFullError, match=r"takes about 6\.0 s, too long"):
            room.admit(ENCODE, 1, time.monotonic() + 8)
        room.admit(ENCODE, 1, time.monotonic() + 60)
    assert (
        room._metrics.registry.get_sample_value("drorae_rejected_requests_total", {"reason": "deadline"}) == 1
    )
