"""The order, the bounds and the rate of many jobs at once, without doing any of them."""

from typing import Generic, TypeVar

T = TypeVar("T")

_BACK_OFF = 0.7


class Window(Generic[T]):
    """Jobs that run at once, and results that wait for their turn.

    At most ``concurrency`` jobs run or pause, and at most twice as many are begun and not yet taken, so
    memory is bounded whatever the number of jobs. Refusals lower the number that may run, by 30 % per round;
    successes raise it again, by one per round, as TCP does it. Jobs that pause before another attempt leave
    their place to others.

    Args:
        concurrency: most jobs at once.
    """

    def __init__(self, concurrency: int) -> None:
        self._concurrency = concurrency
        self._limit = float(concurrency)
        self._num_begun = self._num_taken = self._num_running = self._num_pausing = 0
        self._first_after_cut = 0
        self._done: dict[int, T] = {}

    @property
    def limit(self) -> int:
        """How many jobs may run now."""
        return int(self._limit)

    @property
    def is_open(self) -> bool:
        """Whether another job may begin."""
        return (
            self._num_running < self.limit
            and self._num_running + self._num_pausing < self._concurrency
            and self._num_outstanding < 2 * self._concurrency
        )

    @property
    def is_empty(self) -> bool:
        """Whether every job that began was taken."""
        return self._num_outstanding == 0

    @property
    def has_next(self) -> bool:
        """Whether the oldest job that was not taken is done."""
        return self._num_taken in self._done

    @property
    def _num_outstanding(self) -> int:
        return self._num_begun - self._num_taken

    def begin(self) -> int:
        """Begin a job; gives its number."""
        self._num_begun += 1
        self._num_running += 1
        return self._num_begun - 1

    def finish(self, number: int, result: T) -> None:
        """A job is done."""
        self._num_running -= 1
        self._done[number] = result
        self._limit = min(self._limit + 1 / self._limit, float(self._concurrency))

    def pause(self, number: int, refused: bool) -> None:
        """A job pauses before another attempt, perhaps because it was refused.

        Jobs that began before the limit was last lowered do not lower it again.
        """
        self._num_running -= 1
        self._num_pausing += 1
        if refused and number >= self._first_after_cut:
            self._limit = max(1.0, self._limit * _BACK_OFF)
            self._first_after_cut = self._num_begun

    def resume(self) -> None:
        """A pause is over."""
        self._num_pausing -= 1
        self._num_running += 1

    def take(self) -> T:
        """The result of the oldest job; ``has_next`` says whether it is there."""
        self._num_taken += 1
        return self._done.pop(self._num_taken - 1)
