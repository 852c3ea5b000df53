"""Long bytes in slices give what bytes in one piece give."""

import pytest

from service.codecs.json.slices import copied, find

MIB = 1 << 20
LONG = b"a" * (2 * MIB - 3) + b"needle" + b"a" * MIB + b"needle"  # the first lies across a slice's end


@pytest.mark.parametrize(
    "start", [0, 1, 2 * MIB - 3, 2 * MIB - 2, 3 * MIB, len(LONG) - 6, len(LONG), len(LONG) + 9]
)
@pytest.mark.parametrize("end", [len(LONG), len(LONG) - 1, 2 * MIB + 3, 2 * MIB + 2, 0])
@pytest.mark.parametrize("needle", [b"needle", b"e", b"b"])
def test_find(needle: bytes, start: int, end: int) -> None:
    assert find(LONG, needle, start, end) == LONG.find(needle, start, end)


@pytest.mark.parametrize(("start", "end"), [(0, len(LONG)), (5, 2 * MIB), (7, 7), (MIB, 10 * MIB)])
def test_copied(start: int, end: int) -> None:
    assert copied(LONG, start, end) == LONG[start:end]
    assert copied(memoryview(LONG)[start:end]) == LONG[start:end]
    assert copied(b"") == b""
