"""Nested lists of numbers in JSON: read and written in slices.

The nesting of lists shows in their skeleton, which has a 0 for every number, and else only brackets and
commas: ``[[1.5, 2], [3, 4e-5]]`` has the skeleton ``[[0,0],[0,0]]``. Once it is that of a tensor, the
brackets have said all, and the numbers are read as one flat list.
"""

import math
from collections.abc import Iterator
from itertools import pairwise

import numpy as np
import torch
from pydantic_core import from_json, to_json
from torch import Tensor

from service.codecs.json.slices import find
from service.errors import LatentsError, MalformedError, TooLargeError

_SLICE_BYTES = 64 * 1024  # parsed in 1 ms or less, up to 3 ms where numbers have a digit each
_SLICE_NUMBERS = 8 * 1024  # written in 1 ms
_NUMBER = b"0123456789+-.eE" + bytes(set(b"NaN" + b"Infinity"))
_TO_SKELETON = bytes.maketrans(_NUMBER, b"0" * len(_NUMBER))
_TO_FLAT = bytes.maketrans(b"[]", b"  ")
_ZERO = ord("0")
_WHITESPACE = b" \t\r\n"
_MAX_DIMENSIONS = 8
_MAX_DEPTH = 200
_MAX_GAP_BYTES = 1000


def read_numbers(text: bytes, start: int, max_shape: tuple[int, ...]) -> tuple[Tensor, int]:
    """The numbers of nested lists as a float32 tensor of their shape, and where the lists end.

    Numbers too large for float32 become infinite.

    Args:
        text: JSON.
        start: where the outermost opening bracket is.
        max_shape: of the largest tensor that is accepted.

    Raises:
        MalformedError: invalid JSON.
        LatentsError: ragged or empty lists, or something other than numbers.
        TooLargeError: more numbers or lists than ``max_shape`` has.
    """
    end = _end(text, start)
    skeleton = _skeleton(text, start, end, _skeleton_length(max_shape))
    shape = _shape(skeleton)
    numbers = np.empty(shape, np.float32).reshape(-1)
    num_read = 0
    for piece in _pieces(text, start, end):
        values = _parse(piece)
        numbers[num_read : num_read + len(values)] = values
        num_read += len(values)
    return torch.from_numpy(numbers).reshape(shape), end


def write_numbers(tensor: Tensor) -> Iterator[bytes]:
    """The text between the outermost brackets of nested lists [N, C, h, w]."""
    num_planes = max(1, _SLICE_NUMBERS // tensor[0, 0].numel())
    for index, item in enumerate(tensor):
        yield b",[" if index else b"["
        for first in range(0, len(item), num_planes):
            yield b"," if first else b""
            yield to_json(item[first : first + num_planes].tolist())[1:-1]
        yield b"]"


def _end(text: bytes, start: int) -> int:
    """The end of the lists: lists of numbers hold neither quotes nor braces, and one of them comes next."""
    stop = find(text, b"}", start)
    quote = find(text, b'"', start, stop if stop >= 0 else len(text))
    stop = quote if quote >= 0 else stop
    if stop < 0:
        raise MalformedError("The body is not valid JSON: it ends within a list.")
    end = text.rfind(b"]", start, stop) + 1
    if end == 0 or stop - end > _MAX_GAP_BYTES or text[end:stop].strip(_WHITESPACE) not in (b"", b","):
        raise LatentsError("The lists of 'latents' hold something other than numbers.")
    return end


def _pieces(text: bytes, start: int, end: int) -> Iterator[bytes]:
    """The text between ``start`` and ``end``, cut at commas, which are left out."""
    while start < end:
        cut = end if end - start <= _SLICE_BYTES else text.rfind(b",", start, start + _SLICE_BYTES)
        if cut < 0:
            raise MalformedError(f"The body has {_SLICE_BYTES} bytes without a comma within 'latents'.")
        yield text[start:cut]
        start = cut + 1


def _skeleton(text: bytes, start: int, end: int, max_bytes: int) -> bytes:
    parts: list[bytes] = []
    num_bytes = 0
    for piece in _pieces(text, start, end):
        marks = np.frombuffer(piece.translate(_TO_SKELETON), np.uint8)
        kept = np.ones(len(marks), np.bool_)
        kept[1:] = (marks[1:] != _ZERO) | (marks[:-1] != _ZERO)
        part = marks[kept].tobytes().translate(None, _WHITESPACE)
        parts.append(part)
        num_bytes += len(part) + 1
        if num_bytes > max_bytes + 1:
            raise TooLargeError("The body has more numbers or lists than the most latents that are accepted.")
    return b",".join(parts)


def _skeleton_length(shape: tuple[int, ...]) -> int:
    length = 1
    for size in reversed(shape):
        length = size * (length + 1) + 1
    return length


def _shape(skeleton: bytes) -> tuple[int, ...]:
    """The shape of the tensor whose skeleton this is.

    Raises:
        MalformedError: nested beyond all bounds.
        LatentsError: it is no tensor's.
    """
    strangers = skeleton.translate(None, b"0[],")
    if strangers:
        before = skeleton.count(b"0", 0, skeleton.index(strangers[:1]))
        raise LatentsError(f"The lists of 'latents' hold something other than numbers, near number {before}.")
    depth = len(skeleton) - len(skeleton.lstrip(b"["))
    if depth > _MAX_DEPTH:
        raise MalformedError(f"The body is not valid JSON of this kind: its lists are nested {depth} deep.")
    if depth > _MAX_DIMENSIONS:
        raise LatentsError(
            f"The lists of 'latents' are nested {depth} deep: they are [N, C, h, w] or [C, h, w]."
        )
    # How many numbers the first list of each depth holds, the innermost first.
    counts = [1] + [_count_until(skeleton, b"]" * level) for level in range(1, depth + 1)]
    if 0 in counts:
        raise LatentsError("The lists of 'latents' begin with an empty one.")
    shape = tuple(-(-outer // inner) for inner, outer in pairwise(counts))[::-1]
    expected = _skeleton_start(shape, len(skeleton))
    if expected != skeleton:
        raise LatentsError(
            f"The lists of 'latents' differ in length or depth: their shape would be {list(shape)} without "
            f"{_first_difference(skeleton, expected, shape)}."
        )
    return shape


def _count_until(skeleton: bytes, closing: bytes) -> int:
    end = skeleton.find(closing)
    return skeleton.count(b"0", 0, end if end >= 0 else len(skeleton))


def _skeleton_start(shape: tuple[int, ...], num_bytes: int) -> bytes:
    """The skeleton of a tensor; of a long one a beginning of at least ``num_bytes`` + 1 bytes."""
    text = b"0"
    for size in reversed(shape):
        num_needed = min(size, num_bytes // len(text) + 2)
        text = b"[" + (text + b",") * (num_needed - 1) + text + (b"]" if num_needed == size else b"")
    return text


def _first_difference(skeleton: bytes, expected: bytes, shape: tuple[int, ...]) -> str:
    """The place of the number at which the skeletons part."""
    length = min(len(skeleton), len(expected))
    differs = np.frombuffer(skeleton, np.uint8, length) != np.frombuffer(expected, np.uint8, length)
    index = skeleton.count(b"0", 0, int(differs.argmax()) if differs.any() else length)
    if index >= math.prod(shape):
        return "what follows its last number"
    return "latents" + "".join(f"[{place}]" for place in np.unravel_index(index, shape))


def _parse(piece: bytes) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """The numbers of a slice, its brackets left aside."""
    try:
        values = from_json(b"[%s]" % piece.translate(_TO_FLAT))
        with np.errstate(over="ignore"):
            return np.array(values, np.float64).astype(np.float32)
    except ValueError as exc:
        raise MalformedError(
            f"The body is not valid JSON: within 'latents', {str(exc).partition(' at line')[0]}."
        ) from exc
    except OverflowError as exc:
        raise LatentsError("The lists of 'latents' hold a whole number that is too large.") from exc
