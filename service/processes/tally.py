"""What all requests hold now, counted by one process or by several that share memory."""

ITEMS = ("encode", "decode", "reconstruct", "route")
"""Items of each operation, by its name."""
NAMES = ("requests", "bytes", "pixels", *ITEMS)
ROW_BYTES = 8 * len(NAMES)


class Tally:
    """Numbers by name, in a row for each process.

    A process changes its own row alone, so there is no lock that one which dies could keep. To hold to a
    bound, count first and look at the total then: two processes never exceed it together.

    Args:
        memory: of all rows, `ROW_BYTES` each; None for a single process.
        own: index of this process's row.
    """

    def __init__(self, memory: memoryview | None = None, own: int = 0) -> None:
        self._cells = (memoryview(bytearray(ROW_BYTES)) if memory is None else memory).cast("q")
        columns = {name: column for column, name in enumerate(NAMES)}
        self._totals = {name: self._cells[column :: len(NAMES)] for name, column in columns.items()}
        self._own = {name: own * len(NAMES) + column for name, column in columns.items()}

    def add(self, name: str, number: int) -> None:
        """Count so many more, or fewer."""
        self._cells[self._own[name]] += number

    def total(self, name: str) -> int:
        """Of all processes."""
        return sum(self._totals[name])

    def clear(self, row: int) -> None:
        """Forget the numbers of a process that has ended."""
        for cell in range(row * len(NAMES), (row + 1) * len(NAMES)):
            self._cells[cell] = 0
