"""Messages through a socket, in whatever pieces they come; a tally in shared memory."""

from service.processes.children import Frames, frame
from service.processes.tally import NAMES, ROW_BYTES, Tally


def test_messages_are_put_together_again() -> None:
    sent = [b"", b"one", b"x" * 1000, b"last"]
    stream = b"".join(map(frame, sent))
    for step in (1, 3, 500, len(stream)):
        frames = Frames()
        pieces = [stream[start : start + step] for start in range(0, len(stream), step)]
        assert [message for piece in pieces for message in frames.feed(piece)] == sent


def test_rows_of_a_tally_add_up() -> None:
    memory = memoryview(bytearray(3 * ROW_BYTES))
    first, last = Tally(memory, 0), Tally(memory, 2)
    first.add("bytes", 2**40)
    last.add("bytes", 5)
    last.add("encode", 3)
    assert first.total("bytes") == last.total("bytes") == 2**40 + 5
    assert first.total("encode") == 3
    first.clear(2)
    assert [last.total(name) for name in NAMES] == [0, 2**40, 0, 0, 0, 0, 0]
    last.add("bytes", -5)
    last.add("bytes", 5)
    assert first.total("bytes") == 2**40
