"""Splitting multipart bodies, as RFC 2046 and RFC 7578 have them."""

import pytest

from service.codecs.multipart import split_multipart
from service.errors import MalformedError, OptionError, ServiceError, TooLargeError

BOUNDARY = b"Bound-4ry"
PART = b'--Bound-4ry\r\nContent-Disposition: form-data; name="images"; filename="a.jpg"\r\n\r\n'
END = b"\r\n--Bound-4ry--\r\n"


def split(body: bytes, boundary: bytes | None = BOUNDARY, max_parts: int = 3) -> list[bytes]:
    return split_multipart(body, boundary, max_parts)


@pytest.mark.parametrize(
    "content", [b"", b"abc", b"\r\n", b"\r\n--", b"\r\n-Bound-4ry", bytes(range(256)) * 9]
)
def test_contents_stay_as_they_are(content: bytes) -> None:
    assert split(PART + content + END) == [content]
    assert split(PART + content + b"\r\n" + PART + b"more" + END) == [content, b"more"]


@pytest.mark.parametrize("preamble", [b"\r\n", b"This is a preamble.\r\n", b"--Boun\r\n", b"\r\n" * 1000])
def test_a_preamble_is_skipped(preamble: bytes) -> None:
    assert split(preamble + PART + b"abc" + END) == [b"abc"]


@pytest.mark.parametrize(
    "epilogue", [b"", b"\r\n", b"An epilogue.\r\n", b" \t\r\n" + PART, b"\r\n" * 100_000]
)
def test_an_epilogue_is_skipped(epilogue: bytes) -> None:
    assert split(PART + b"abc\r\n--Bound-4ry--" + epilogue) == [b"abc"]


def test_padding_behind_boundaries() -> None:
    body = PART.replace(b"4ry\r\n", b"4ry \t \r\n") + b"abc" + END
    assert split(body) == [b"abc"]


def test_other_headers_and_their_case() -> None:
    head = (
        b"--Bound-4ry\r\ncontent-type: image/*\r\nCONTENT-DISPOSITION:form-data; name=images\r\nX: y\r\n\r\n"
    )
    assert split(head + b"abc" + END) == [b"abc"]


@pytest.mark.parametrize(
    ("body", "error", "words"),
    [
        (b"hello", MalformedError, "lacks the boundary"),
        (PART + b"abc", MalformedError, "truncated"),
        (PART + b"abc\r\n--Bound-4ry-", MalformedError, "boundary"),
        (PART + b"abc\r\n--Bound-4ry and more" + END, MalformedError, "alone on its line"),
        (PART.replace(b"\r\n", b"\n") + b"abc" + END, MalformedError, "alone on its line"),
        (b"--Bound-4ry\r\nA: b\r\n\r\nabc" + END, MalformedError, "no name"),
        (b"--Bound-4ry\r\n\r\nabc" + END, MalformedError, "no name"),
        (b"--Bound-4ry\r\nA: " + b"b" * 100_000 + b"\r\n\r\nabc" + END, MalformedError, "do not end"),
        (b"--Bound-4ry\r\nA: b" + END, MalformedError, "do not end"),
        (b"--Bound-4ry--\r\n", MalformedError, "no part"),
        (PART.replace(b"images", b"file") + b"abc" + END, OptionError, "'file'"),
        (PART.replace(b"images", b"\xff\xfe") + b"abc" + END, OptionError, "Unknown multipart field"),
        ((PART + b"a\r\n") * 4 + b"--Bound-4ry--", TooLargeError, "more than 3 items"),
        ((PART + b"a\r\n") * 100_000 + b"--Bound-4ry--", TooLargeError, "more than 3 items"),
    ],
)
def test_refused(body: bytes, error: type[ServiceError], words: str) -> None:
    with pytest.raises(error, match=words):
        split(body)


@pytest.mark.parametrize("boundary", [None, b""])
def test_no_boundary(boundary: bytes | None) -> None:
    with pytest.raises(MalformedError, match="no boundary"):
        split(PART + b"abc" + END, boundary)
