"""JSON objects with one long list: the list is set apart, the rest is short and valid."""

import json
import tracemalloc

import pytest
from pydantic import BaseModel, ConfigDict

from service.codecs.json.documents import looks_like_json, read_document, write_document
from service.errors import MalformedError, OptionError, ServiceError, TooLargeError

MIB = 1 << 20


class Fields(BaseModel):
    model_config = ConfigDict(extra="forbid")

    items: list[int]
    name: str | None = None


def read_list(text: bytes, start: int) -> tuple[bytes, int]:
    end = text.index(b"]", start) + 1
    return text[start:end], end


def read(text: str | bytes) -> tuple[Fields, bytes]:
    data = text if isinstance(text, bytes) else text.encode()
    return read_document(data, Fields, "items", b"[0]", read_list)


@pytest.mark.parametrize(
    "text",
    [
        '{"items": [1, 2], "name": "a"}',
        '{"name": "a", "items": [1, 2]}',
        ' {\n"items"\t:\r\n[1, 2] , "name" : "a" } ',
        '\ufeff{"items": [1, 2], "name": "a"}',
        '{"name": "\\u0061", "items": [1, 2]}',
    ],
)
def test_documents(text: str) -> None:
    fields, items = read(text)
    assert fields == Fields(items=[0], name="a")
    assert items == b"[1, 2]"


@pytest.mark.parametrize(
    ("text", "error", "words"),
    [
        ('{"items": [1]', MalformedError, "not valid JSON"),
        ('{"items": [1]}}', MalformedError, "not valid JSON"),
        ('{"items": [1] 2}', MalformedError, "not valid JSON"),
        ('{"items": [1], "items": [2]}', MalformedError, "two members of one name"),
        ('{"items": [1], "items": [0]}', MalformedError, "two members of one name"),
        ('{"items": [1], "name": "a", "name": "b"}', MalformedError, "two members of one name"),
        ('{"items": [1], "name": "\\ud800"}', MalformedError, "not valid JSON"),
        ('{"items": [1], "name": ' + "[" * 5000 + "]" * 5000 + "}", MalformedError, "not valid JSON"),
        ('{"items": [1], "name": ' + "9" * 5000 + "}", MalformedError, "not valid JSON"),
        ('{"items": [1], "other": 1}', OptionError, "Unknown field 'other'"),
        ('{"items": [1], "name": 1}', OptionError, "'name'"),
        ('{"items": 1}', OptionError, "'items'"),
        ('{"items": {"a": 1}}', OptionError, "'items'"),
        ('{"\\u0069tems": [1]}', OptionError, "'items' is missing"),
        ('{"name": "\\"items\\": [1]"}', OptionError, "'items' is missing"),
        ("{}", OptionError, "'items' is missing"),
        ("[1]", OptionError, "object"),
        ("null", OptionError, "object"),
        ("", MalformedError, "not valid JSON"),
        ('{"items": [1], "name": "' + "a" * 20_000 + '"}', TooLargeError, "fields beside"),
        ('{"name": "' + "a" * 20_000 + '", "items": [1]}', MalformedError, "no list 'items' begins"),
    ],
)
def test_refused(text: str, error: type[ServiceError], words: str) -> None:
    with pytest.raises(error, match=words):
        read(text)


def test_other_encodings() -> None:
    for encoding in ("utf-16", "utf-32", "utf-16-be", "utf-32-be", "utf-16-le"):
        text = "" if encoding in ("utf-16", "utf-32") else "\ufeff"
        with pytest.raises(MalformedError, match="not valid JSON"):
            read((text + '{"items": [1]}').encode(encoding))
    with pytest.raises(MalformedError, match="not valid JSON"):
        read(b'{"items": [1], "name": "\xff"}')


def test_what_looks_like_json() -> None:
    for text in (b"{", b' \r\n\t{"a": 1}', b"\xef\xbb\xbf {", b" " * 1000 + b"{"):
        assert looks_like_json(text)
    for text in (b"", b"[", b"a{", b" " * MIB + b"{"):
        assert not looks_like_json(text)


def test_writing() -> None:
    text = write_document(Fields(items=[5, 6], name="é"), {"items": [b"1,", b"2"]})
    assert json.loads(text) == {"name": "é", "items": [1, 2]}


HOSTILE = {
    "unknown fields": b'{"items":[1],' + b",".join(b'"a%d":0' % index for index in range(100_000)) + b"}",
    "before": b"{" + b",".join(b'"a%d":0' % index for index in range(100_000)) + b',"items":[1]}',
    "one name": b'{"items":[1]' + b',"items":[1]' * 80_000 + b"}",
    "brackets": b'{"items":[1],"x":[' + b"[[[[[[[[[]]]]]]]]]," * 50_000 + b"0]}",
    "depth": b"[" * MIB,
    "long name": b'{"' + b"k" * MIB + b'":1,"items":[1]}',
    "spaces": b" " * MIB,
    "wide": b'{"items":[1],"name":"' + b"a" * MIB + "\U0001f600".encode() + b'"}',
    "fields that are nearly too long": b'{"items":[1],'
    + b",".join(b'"%x":{}' % index for index in range(1800))
    + b"}",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_memory_is_bounded(text: bytes) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(ServiceError) as caught:
            read(text)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert 400 <= caught.value.status < 500
    assert peak_bytes < 10 * max(len(text), MIB // 4)
