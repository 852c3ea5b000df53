"""Nested lists of numbers: the values that Python's own reader gives, at a cost that the text bounds."""

import json
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic_core import from_json

from service.codecs.json import numbers as json_numbers
from service.codecs.json.numbers import read_numbers, write_numbers
from service.codecs.media_types import JSON
from service.codecs.requests import reading_bytes
from service.errors import LatentsError, MalformedError, ServiceError, TooLargeError

MAX_SHAPE = (4, 32, 8, 8)
RELAXED = settings(deadline=None)  # a busy machine is no failure
JSON_NUMBERS = (
    st.integers(-(10**40), 10**40).map(str)
    | st.floats(allow_nan=False, allow_infinity=False).map(repr)
    | st.from_regex(r"-?(0|[1-9][0-9]{0,30})(\.[0-9]{1,30})?([eE][+-]?[0-9]{1,3})?", fullmatch=True)
)


def read(lists: str, max_shape: tuple[int, ...] = MAX_SHAPE) -> torch.Tensor:
    text = b'{"latents":' + lists.encode("utf-8", "surrogatepass") + b',"more":"]"}'
    tensor, end = read_numbers(text, len(b'{"latents":'), max_shape)
    assert text[end:] == b',"more":"]"}'
    return tensor


@pytest.mark.parametrize("shape", [(1,), (7,), (2, 3), (1, 1, 1, 1), (3, 1, 2, 1), (32, 8, 8), (4, 32, 8, 8)])
@pytest.mark.parametrize("indent", [None, 0, 3])
def test_shapes(shape: tuple[int, ...], indent: int | None) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    assert torch.equal(read(json.dumps(values.tolist(), indent=indent)), values)


@RELAXED
@given(numbers=st.lists(JSON_NUMBERS, min_size=1, max_size=20))
@example(numbers=["9007199254740993", "1.00000017881393432617187499", "-0", "-0.0", "5e-324", "1e999999"])
@example(numbers=["16777217", "3.4028235677973366e38", "1" * 400 + ".0", "0." + "0" * 400 + "1", "1E+2"])
def test_values_are_those_of_json(numbers: list[str]) -> None:
    text = f"[{' , '.join(numbers)}]"
    with np.errstate(over="ignore"):
        expected = np.array(json.loads(text, parse_int=float)).astype(np.float32)
    np.testing.assert_array_equal(read(text).numpy(), expected)


def test_long_lists_are_read_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths: list[int] = []

    def noting_from_json(text: bytes) -> Any:
        lengths.append(len(text))
        return from_json(text)

    monkeypatch.setattr(json_numbers, "from_json", noting_from_json)
    values = torch.randn((2, 192, 16, 16), generator=torch.Generator().manual_seed(0))
    text = json.dumps(values.tolist())
    assert len(text) > 1_000_000
    assert torch.equal(read(text, (2, 192, 16, 16)), values)
    assert max(lengths) < 70_000


def test_not_a_number_is_read_as_json_does() -> None:
    values = read("[NaN, Infinity, -Infinity, 1e400]")
    assert math.isnan(values[0])
    assert values[1:].tolist() == [math.inf, -math.inf, math.inf]


@pytest.mark.parametrize(
    ("lists", "words"),
    [
        ("[[1, 2], [3]]", r"differ in length.*latents\[1\]\[1\]"),
        ("[[1], [2, 3]]", r"differ in length.*latents\[2\]"),
        ("[[1, 2], 3]", r"differ in length.*latents\[1\]"),
        ("[1, [2]]", r"differ in length.*latents\[1\]"),
        ("[[[1]], [2]]", r"differ in length.*latents\[1\]"),
        ("[1, 2]]", "differ in length"),
        ("[[1, 2]", "differ in length"),
        ("[1,]", "differ in length"),
        ("[1,,2]", "differ in length"),
        ("[1]2", "other than numbers"),
        ("[[1]2]", "differ in length"),
        ("[[1,]2]", "differ in length"),
        ("[1[2]]", "differ in length"),
        ("[[1][2]]", "differ in length"),
        ("[,1]", "differ in length"),
        ("[[]]", "empty"),
        ("[[],[1]]", "empty"),
        ("[[1],[]]", "differ in length"),
        ("[" * 9 + "1" + "]" * 9, "9 deep"),
        ("[" + "[1]," * 100 + "[" * 50 + "]" * 50 + "]", "differ in length"),
        ("[true]", "other than numbers"),
        ("[1, null]", "other than numbers, near number"),
        ("[[1, 2], [3, {}]]", "other than numbers"),
        ("[1, é]", "other than numbers"),
        ("[" + "9" * 400 + "]", "too large"),
    ],
)
def test_what_is_no_tensor_of_numbers(lists: str, words: str) -> None:
    with pytest.raises(LatentsError, match=words):
        read_numbers(f'{{"latents":{lists}}}'.encode(), len('{"latents":'), MAX_SHAPE)


@pytest.mark.parametrize(
    "lists",
    [
        *(
            "[01]",
            "[1.]",
            "[.5]",
            "[+1]",
            "[--1]",
            "[1e]",
            "[1e+]",
            "[1 2]",
            "[1\n\n2]",
            "[0x10]",
            "[1_0]",
            "[1-2]",
        ),
        *("[NaNN]", "[nan]", "[inf]", "[Infinit]", "[Na N]", "[" + "[" * 300 + "1" + "]" * 300 + "]"),
        *("[" + "9" * 5000 + "]", "[1," + " " * 100_000 + "2]", "[1." + "0" * 100_000 + "1, 2]"),
    ],
)
def test_what_is_no_json(lists: str) -> None:
    with pytest.raises((MalformedError, LatentsError)):
        read(lists)


@pytest.mark.parametrize("text", [b'{"latents":[[1', b'{"latents":[1, 2]', b'{"latents":['])
def test_cut_off(text: bytes) -> None:
    with pytest.raises(MalformedError, match="not valid JSON"):
        read_numbers(text, len(b'{"latents":'), MAX_SHAPE)


@RELAXED
@given(text=st.text(alphabet='[],0123456789.-+eENaInfity \n"{}:x', max_size=40))
def test_any_text_is_read_as_json_or_refused(text: str) -> None:
    document = f'{{"latents":[{text}]}}'
    try:
        tensor, end = read_numbers(document.encode(), len('{"latents":'), MAX_SHAPE)
    except (LatentsError, MalformedError, TooLargeError):
        return
    with np.errstate(over="ignore"):
        expected = np.array(json.loads(document[len('{"latents":') : end]), np.float64).astype(np.float32)
    np.testing.assert_array_equal(tensor.numpy(), expected)


MIB = 1 << 20
LARGE = (32, 192, 16, 16)
HOSTILE = {
    "numbers": b"0," * (MIB // 2) + b"0",
    "brackets": b"[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]," * (MIB // 39) + b"0",
    "empty lists": b"[]," * (MIB // 3) + b"0",
    "one number a list": b"[0]," * (MIB // 4) + b"[0]",
    "depth": b"[" * (MIB // 2) + b"]" * (MIB // 2),
    "unclosed": b"[" * MIB,
    "ragged": b"[" * 7 + b"0" + b"]" * 7 + b",0" * (MIB // 2),
    "strings": b'"' + b"x" * (MIB // 2) + b'"' + b',""' * (MIB // 6),
    "digits": b"9" * MIB,
    "a digit of a million": b"0." + b"1" * 60_000 + (b",0." + b"1" * 60_000) * 16,
    "exponents": b"1e999999," * (MIB // 9) + b"0",
    "whole numbers": (b"9" * 4000 + b",") * (MIB // 4001) + b"0",
    "spaces": b"1" + b" " * MIB,
    "commas": b"," * MIB,
    "words": b"NaN," * (MIB // 4) + b"NaN",
    "objects": b'{"a":1},' * (MIB // 8) + b"0",
    "not UTF-8": b"\xff" * MIB,
}


@pytest.mark.parametrize("lists", HOSTILE.values(), ids=HOSTILE)
def test_memory_is_bounded_by_the_text(lists: bytes) -> None:
    text = b'{"latents":[' + lists + b"]}"
    tracemalloc.start()
    try:
        try:
            read_numbers(text, len(b'{"latents":'), (64, 192, 16, 16))
        except ServiceError as exc:
            status = exc.status
        else:
            status = 200
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert status < 500
    assert peak_bytes < 10 * len(text)


@pytest.mark.parametrize(
    "values", [np.ones(LARGE, np.int8), np.full(LARGE, 0.1), np.ones(math.prod(LARGE), np.int8)]
)
def test_memory_is_what_the_request_holds(values: Any) -> None:
    text = b'{"latents":' + json.dumps(values.tolist(), separators=(",", ":")).encode() + b"}"
    tracemalloc.start()
    try:
        read_numbers(text, len(b'{"latents":'), LARGE)
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    slack = 2 * MIB  # of a slice
    assert len(text) + peak_bytes < reading_bytes(JSON, len(text), 1, values.shape) + slack


def test_more_numbers_or_lists_than_are_accepted() -> None:
    at_most = json.dumps(np.zeros(MAX_SHAPE).tolist())
    assert read(at_most).shape == MAX_SHAPE
    for more in (np.zeros((5, 32, 8, 8)), np.zeros((4, 32, 8, 9)), np.zeros((4, 32 * 64, 1))):
        with pytest.raises(TooLargeError):
            read(json.dumps(more.tolist()))


@pytest.mark.parametrize("shape", [(1, 32, 8, 8), (3, 192, 16, 16), (2, 1, 100, 100), (2, 3, 1, 1)])
def test_written_text_is_what_json_reads(shape: tuple[int, ...]) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        pieces: list[Any] = list(write_numbers(values.to(dtype)))
        assert max(len(piece) for piece in pieces) < 400_000
        assert json.loads(b"[" + b"".join(pieces) + b"]") == values.to(dtype).float().tolist()
