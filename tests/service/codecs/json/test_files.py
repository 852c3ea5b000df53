"""Lists of files as base64 in JSON."""

import base64
import json
import tracemalloc

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from service.codecs.json.files import read_files, write_files
from service.errors import MalformedError, OptionError, ServiceError, TooLargeError

RELAXED = settings(deadline=None)  # a busy machine is no failure
MIB = 1 << 20


def read(items: str | bytes, max_files: int = 4) -> list[bytes]:
    text = b"[" + (items if isinstance(items, bytes) else items.encode()) + b', "more"'
    files, end = read_files(text, 0, max_files)
    assert text[end:] == b', "more"'
    return files


@RELAXED
@given(files=st.lists(st.binary(max_size=50), min_size=1, max_size=4), indent=st.none() | st.integers(0, 4))
def test_files(files: list[bytes], indent: int | None) -> None:
    encoded = json.dumps([base64.b64encode(file).decode() for file in files], indent=indent)
    assert read(encoded[1:]) == files
    assert (
        b"[" + b"".join(write_files(files)) + b"]"
        == json.dumps(json.loads(encoded)).replace(" ", "").encode()
    )


@pytest.mark.parametrize("extra", range(7))
def test_long_files_and_escapes(extra: int) -> None:
    file = bytes(range(256)) * 4000 + b"\xff\xef\xbe" * 3000 + bytes(extra)
    plain = base64.b64encode(file).decode()
    assert len(plain) > MIB
    for escaped in (
        plain,
        plain.replace("/", "\\/"),
        plain.replace("+", "\\u002B"),
        plain.replace("A", "\\u0041"),
    ):
        assert read(f'"{escaped}"]') == [file]


@pytest.mark.parametrize(
    "text",
    [
        *(
            "A",
            "AA",
            "AAA",
            "AAAAA",
            "AA=",
            "A===",
            "====",
            "=",
            "AA==AA==",
            "AAAA=",
            "AA=A",
            "_9j-",
            "AA AA",
            "é",
        ),
        *("AAAA\n", "\\n", "\\u0000", "\\ud800", "\\", "\\x", "\\u00", "A\\/", 'AA\\"', "AA==" * 100_000),
        *("A" * 262_142 + "==" + "AAAA", "A" * 262_145, "\\" * 1_000_001, "\\u0041" * 100_001),
    ],
)
def test_what_is_no_base64(text: str) -> None:
    with pytest.raises(MalformedError, match="Image 1 is not standard base64"):
        read(f'"AAAA", "{text}"]')


@pytest.mark.parametrize("text", [b"\xff\xfe", b"\xed\xa0\x80", b"A" * 100 + b"\0"])
def test_what_is_no_text(text: bytes) -> None:
    with pytest.raises(MalformedError, match="Image 0 is not standard base64"):
        read(b'"' + text + b'"]')


@pytest.mark.parametrize(
    "items", ["0]", "null]", '"AAAA", 1]', '["AAAA"]]', '{"a": 1}]', '"AAAA",]', "NaN]", ",]"]
)
def test_something_other_than_strings(items: str) -> None:
    with pytest.raises(OptionError, match="is not a string"):
        read(items)


@pytest.mark.parametrize(
    "items", ['"AAAA', '"AAAA" "AAAA"]', '"AAAA" 1]', '"AAAA"}', '"AAAA":1]', '"AAAA"[]]']
)
def test_what_is_no_json(items: str) -> None:
    with pytest.raises(MalformedError, match="not valid JSON"):
        read_files(b"[" + items.encode(), 0, 4)


def test_too_many_files() -> None:
    assert len(read('"",' * 3 + '""]')) == 4
    for num_files in (5, 100_000):
        with pytest.raises(TooLargeError, match="at most 4"):
            read('"",' * (num_files - 1) + '""]')


HOSTILE = {
    "numbers": b"0," * (MIB // 2),
    "strings": b'"abc",' * (MIB // 6),
    "lists": b"[" * MIB,
    "spaces": b" " * MIB,
    "one string": b'"' + b"A" * MIB + b'"',
    "quotes": b'"' * MIB,
    "escaped quotes": b'"' + b'\\"' * (MIB // 2),
    "escapes": b'"' + rb"\u0041" * (MIB // 6) + b'"',
    "backslashes": b'"' + b"\\" * MIB + b'"',
    "wide": b'"' + b"A" * MIB + "\U0001f600".encode() + b'"',
}


@pytest.mark.parametrize("items", HOSTILE.values(), ids=HOSTILE)
def test_memory_is_bounded_by_the_text(items: bytes) -> None:
    text = b"[" + items + b"]"
    tracemalloc.start()
    try:
        try:
            read_files(text, 0, 64)
        except ServiceError as exc:
            status = exc.status
        else:
            status = 200
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert status < 500
    assert peak_bytes < 10 * len(text)
