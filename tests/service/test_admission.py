"""Room: reserved at once or refused at once, given back whatever happens."""

import time
from types import SimpleNamespace
from typing import Any

import pytest

from service.admission import Admission, Reservation
from service.batching import Operation
from service.errors import QueueFullError
from service.metrics import Metrics
from service.rates import Rates
from service.settings import Settings

FAR_S = float("inf")
ENCODE = Operation.ENCODE


def admission(rates: Rates | None = None, num_workers: int = 1, **settings: Any) -> Admission:
    engine: Any = SimpleNamespace(rates=rates or Rates(), num_workers=num_workers)
    defaults = {"queue_limit_items": 10, "max_items_per_request": 10}
    return Admission(Settings(**{**defaults, **settings}), engine, Metrics())


def pending(room: Admission) -> tuple[float | None, float | None]:
    registry = room._metrics.registry
    return tuple(registry.get_sample_value(f"drorae_pending_{name}") for name in ("items", "bytes"))


def reserve(
    room: Admission, num_items: int = 1, num_bytes: int = 0, deadline_s: float = FAR_S
) -> Reservation:
    return room.reserve(ENCODE, num_items, num_bytes, deadline_s)


def test_room_is_given_back_even_after_an_error() -> None:
    room = admission()

    def answer() -> None:
        with reserve(room, 4, 1000):
            assert pending(room) == (4, 1000)
            assert room.num_requests == 1
            raise KeyError

    with pytest.raises(KeyError):
        answer()
    assert pending(room) == (0, 0)
    assert room.num_requests == 0


def test_items_are_reserved_whole_or_not_at_all() -> None:
    room = admission()
    with reserve(room, 7):
        with pytest.raises(QueueFullError, match=r"7 of at most 10 items .* and 4 more came"):
            reserve(room, 4)
        with reserve(room, 3):
            assert pending(room) == (10, 0)


def test_a_body_that_has_more_items_than_its_headers_said() -> None:
    room = admission()
    with reserve(room, 1) as place, reserve(room, 5):
        place.resize_items(5)
        assert pending(room) == (10, 0)
        with pytest.raises(QueueFullError, match="and 1 more came"):
            place.resize_items(6)
        assert pending(room) == (10, 0)
        place.resize_items(2)
        assert pending(room) == (7, 0)
    assert pending(room) == (0, 0)


def test_bytes_are_bounded_and_given_back_early() -> None:
    room = admission(queue_limit_bytes=2000, max_body_bytes=2000)
    with reserve(room, 1, 1500) as place:
        with pytest.raises(QueueFullError, match="1500 of at most 2000 bytes"):
            reserve(room, 1, 501)
        place.resize_bytes(200)
        with reserve(room, 1, 1800):
            assert pending(room) == (2, 2000)


def test_retry_after_follows_from_the_measured_rate() -> None:
    rates = Rates()
    for _ in range(200):
        rates.record(ENCODE, 4, 10.0)
    with reserve(admission(rates), 10) as place, pytest.raises(QueueFullError) as caught:
        reserve(place._admission)
    assert caught.value.headers == {"Retry-After": "25"}
    two_engines = admission(rates, num_workers=2)
    with reserve(two_engines, 10), pytest.raises(QueueFullError) as caught:
        reserve(two_engines)
    assert caught.value.headers == {"Retry-After": "13"}
    unmeasured = admission(retry_after_s=3)
    with reserve(unmeasured, 10), pytest.raises(QueueFullError) as caught:
        reserve(unmeasured)
    assert caught.value.headers == {"Retry-After": "3"}


def test_rates_follow_the_newest_batches() -> None:
    rates = Rates()
    rates.record(ENCODE, 1, 1.0)
    for _ in range(100):
        rates.record(ENCODE, 2, 6.0)
    assert rates.duration_s({ENCODE: 1}, 1) == pytest.approx(3.0, rel=1e-3)
    assert rates.duration_s({Operation.DECODE: 5}, 1) == 0.0


def test_a_deadline_that_the_backlog_outlasts_is_refused() -> None:
    rates = Rates()
    rates.record(ENCODE, 1, 2.0)
    room = admission(rates)
    with reserve(room, 3):
        with pytest.raises(QueueFullError, match=r"takes about 6\.0 s, too long"):
            reserve(room, deadline_s=time.monotonic() + 8)
        with reserve(room, deadline_s=time.monotonic() + 60):
            pass
    assert (
        room._metrics.registry.get_sample_value("drorae_rejected_requests_total", {"reason": "deadline"}) == 1
    )
