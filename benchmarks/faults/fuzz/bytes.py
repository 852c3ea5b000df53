"""Mutations that know nothing of what they mutate: bits, lengths, cuts and splices."""

import random
import struct
from collections.abc import Callable, Mapping, Sequence

Mutation = Callable[[random.Random, bytes, Sequence[bytes]], bytes]
"""Random numbers, the body, and other bodies to splice with."""

_EDGES = (0, 1, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF)
_FOREIGN_HEADS = (
    b"\xff\xd8\xff\xe0\x00\x10JFIF\x00",
    b"\x89PNG\r\n\x1a\n",
    b"RIFF\xff\xff\xff\x7fWEBPVP8X",
    b"GIF89a",
    b"BM",
    b"II*\0",
    b"MM\0*",
    b"\x93NUMPY\x01\x00",
    b'{"images": [',
    b"PK\x03\x04",
    b"%PDF-1.7",
    b"<svg xmlns='http://www.w3.org/2000/svg'/>",
    b"\x80\x04\x95",
    b"",
)
_MAX_GROWTH_BYTES = 1 << 16


def mutate(rng: random.Random, data: bytes, others: Sequence[bytes]) -> tuple[bytes, str]:
    """The body after one to four mutations, and their names."""
    names = rng.choices(list(MUTATIONS), k=rng.choice((1, 1, 1, 2, 3, 4)))
    for name in names:
        data = MUTATIONS[name](rng, data, others)
    return data, "+".join(names)


def _place(rng: random.Random, data: bytes) -> int:
    """An offset; headers are at the front, so half of all are there."""
    return rng.randrange(min(len(data), 96) if rng.random() < 0.5 else len(data)) if data else 0


def _flip_bits(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 8, 64)) if data else 0):
        changed[_place(rng, data)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _set_bytes(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    start, length = _place(rng, data), rng.choice((1, 2, 4, 16, 256))
    length = min(length, len(data) - start)
    fill = rng.choice((b"\0" * length, b"\xff" * length, rng.randbytes(length)))
    return data[:start] + fill + data[start + length :]


def _set_length(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    """Overwrite what may be a length field."""
    layout = rng.choice(("<H", ">H", "<I", ">I", "<Q", ">Q"))
    size = struct.calcsize(layout)
    if len(data) < size:
        return data
    start = min(_place(rng, data), len(data) - size)
    value = rng.choice(_EDGES) & ((1 << 8 * size) - 1)
    return data[:start] + struct.pack(layout, value) + data[start + size :]


def _truncate(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    return data[: _place(rng, data)]


def _remove(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    start = _place(rng, data)
    return data[:start] + data[start + rng.choice((1, 2, 7, 64, 4096)) :]


def _repeat(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    start = _place(rng, data)
    piece = data[start : start + rng.choice((1, 8, 64, 512))]
    times = min(rng.choice((1, 2, 16, 1000)), _MAX_GROWTH_BYTES // max(len(piece), 1))
    return data[:start] + piece * times + data[start:]


def _insert(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    start = _place(rng, data)
    return data[:start] + rng.randbytes(rng.choice((1, 3, 32, 1024))) + data[start:]


def _splice(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    other = rng.choice(others)
    return data[: _place(rng, data)] + other[_place(rng, other) :]


def _foreign_head(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    head = rng.choice(_FOREIGN_HEADS)
    return head + (data if rng.random() < 0.5 else data[len(head) :])


def _append(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    return data + (rng.choice(others) if rng.random() < 0.5 else rng.randbytes(rng.choice((1, 100))))


def _same(rng: random.Random, data: bytes, others: Sequence[bytes]) -> bytes:
    return data


MUTATIONS: Mapping[str, Mutation] = {
    "bits": _flip_bits,
    "bytes": _set_bytes,
    "length": _set_length,
    "truncation": _truncate,
    "removal": _remove,
    "repetition": _repeat,
    "insertion": _insert,
    "splice": _splice,
    "foreign head": _foreign_head,
    "trailing": _append,
    "none": _same,
}
