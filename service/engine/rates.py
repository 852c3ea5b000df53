"""The measured cost of items."""

from collections.abc import Mapping, MutableSequence

from service.engine.operations import OPERATIONS, Operation

NUM_RATES = len(OPERATIONS)
_SMOOTHING = 0.1  # weight of the newest batch: some ten batches are remembered
_PLACES = {operation: place for place, operation in enumerate(OPERATIONS)}


class Rates:
    """Seconds that an engine takes per item of each operation, measured batch by batch.

    Args:
        item_s: where they are kept, a number per operation, 0 before the first batch; other processes may
            read it too.
    """

    def __init__(self, item_s: "MutableSequence[float] | memoryview[float] | None" = None) -> None:
        self._item_s = [0.0] * NUM_RATES if item_s is None else item_s

    def record(self, operation: Operation, num_items: int, duration_s: float) -> None:
        """Note that a batch of ``num_items`` took ``duration_s``."""
        newest, place = duration_s / num_items, _PLACES[operation]
        before = self._item_s[place] or newest
        self._item_s[place] = before + _SMOOTHING * (newest - before)

    def duration_s(self, num_items: Mapping[Operation, int], num_engines: int) -> float:
        """How long so many items keep ``num_engines`` engines busy, seconds."""
        work_s = sum(count * self._item_s[_PLACES[operation]] for operation, count in num_items.items())
        return work_s / max(1, num_engines)
