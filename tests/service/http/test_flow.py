"""How answers are written: head and body at once, interim answers and lone heads without delay."""

from typing import Any

import pytest

from service.http.flow import AnswerTransport

HEAD, CONTINUE = b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 100 Continue\r\n\r\n"


class Transport:
    """Notes what each call writes."""

    def __init__(self) -> None:
        self.written: list[Any] = []

    def is_closing(self) -> bool:
        return False

    def write(self, data: bytes) -> None:
        self.written.append(data)

    def writelines(self, parts: Any) -> None:
        self.written.append(b"".join(parts))


@pytest.fixture
def transport() -> Transport:
    return Transport()


@pytest.fixture
def answer(transport: Transport) -> AnswerTransport:
    return AnswerTransport(transport, lambda: transport.written.append("left"))  # type: ignore[arg-type]


def test_head_and_body_are_one_write(transport: Transport, answer: AnswerTransport) -> None:
    for data in (HEAD, b"a", b"b", HEAD):
        answer.write(data)
    assert transport.written == [HEAD + b"a", b"b", HEAD]


def test_an_interim_answer_does_not_wait(transport: Transport, answer: AnswerTransport) -> None:
    answer.write(CONTINUE)
    answer.write(CONTINUE)
    assert transport.written == [CONTINUE, CONTINUE]
    answer.write(HEAD)
    answer.write(b"a")
    assert transport.written[2:] == [HEAD + b"a"]


@pytest.mark.parametrize("end", ["flush", "close"])
def test_a_head_that_nothing_follows_is_written(
    transport: Transport, answer: AnswerTransport, end: str
) -> None:
    answer.write(HEAD)
    getattr(answer, end)()
    assert transport.written == [HEAD, "left"][: 1 + (end == "close")]
    answer.flush()
    assert transport.written.count(HEAD) == 1


def test_closing_before_anything_was_said(transport: Transport, answer: AnswerTransport) -> None:
    answer.close()
    assert transport.written == ["left"]
