"""The measured cost of items."""

from collections.abc import Mapping

from service.engine.operations import Operation

_SMOOTHING = 0.1  # weight of the newest batch: some ten batches are remembered


class Rates:
    """Seconds that an engine takes per item of each operation, measured batch by batch."""

    def __init__(self) -> None:
        self._item_s: dict[Operation, float] = {}

    def record(self, operation: Operation, num_items: int, duration_s: float) -> None:
        """Note that a batch of ``num_items`` took ``duration_s``."""
        newest = duration_s / num_items
        before = self._item_s.get(operation, newest)
        self._item_s[operation] = before + _SMOOTHING * (newest - before)

    def duration_s(self, num_items: Mapping[Operation, int], num_engines: int) -> float:
        """How long so many items keep ``num_engines`` engines busy, seconds."""
        work_s = sum(count * self._item_s.get(operation, 0.0) for operation, count in num_items.items())
        return work_s / max(1, num_engines)
