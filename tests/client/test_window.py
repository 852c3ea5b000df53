"""Order, bounds and rate of many jobs."""

import random

import pytest

from drorae_client.many.window import Window


def test_results_keep_their_order_and_their_number() -> None:
    """Whatever the order in which jobs end, and however many at once."""
    chance = random.Random(0)
    window: Window[int] = Window(4)
    running: list[int] = []
    taken: list[int] = []
    while len(taken) < 200:
        if window.is_open and chance.random() < 0.7:
            running.append(window.begin())
        if running and chance.random() < 0.7:
            number = running.pop(chance.randrange(len(running)))
            window.finish(number, number)
        if window.has_next and chance.random() < 0.5:
            taken.append(window.take())
        assert len(running) <= 4
        assert not window.is_open or len(taken) + 8 > len(running)
    assert taken == list(range(200))


def test_what_is_held_is_bounded() -> None:
    """A result that is late keeps others from piling up behind it."""
    window: Window[None] = Window(3)
    late = window.begin()
    num_begun = 1
    while window.is_open:
        window.finish(window.begin(), None)
        num_begun += 1
    assert num_begun == 6
    assert not window.has_next
    window.finish(late, None)
    for _ in range(6):
        window.take()
    assert window.is_empty


def test_refusals_lower_and_successes_raise_the_rate() -> None:
    window: Window[None] = Window(16)
    numbers = [window.begin() for _ in range(16)]
    for number in numbers[4:]:
        window.pause(number, refused=True)
    assert window.limit == 11, "one round of refusals lowers it once"
    assert not window.is_open, "those that pause are among the most that there may be"
    for _ in numbers[4:]:
        window.resume()
    for number in numbers:
        window.finish(number, None)
        window.take()
    assert window.limit == 12
    for _ in range(20):
        window.pause(window.begin(), refused=True)
        window.resume()
    assert window.limit == 1
    for number in range(16, 36):
        window.finish(number, None)
        window.take()
    for _ in range(1000):
        window.finish(window.begin(), None)
        window.take()
    assert window.limit == 16


@pytest.mark.parametrize("concurrency", [1, 2])
def test_few_jobs_at_once(concurrency: int) -> None:
    window: Window[None] = Window(concurrency)
    assert window.is_empty
    window.pause(window.begin(), refused=True)
    assert window.limit == 1
    assert window.is_open == (concurrency == 2), "a job that pauses leaves its place"
