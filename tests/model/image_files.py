"""Image files written by hand, so that every chunk and tag is as a test wants it."""

import struct
import zlib
from collections.abc import Sequence

Tags = dict[int, Sequence[int]]
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
GREY, RGB, PALETTE, GREY_ALPHA, RGBA = 0, 2, 3, 4, 6
_CHANNELS = {GREY: 1, RGB: 3, PALETTE: 1, GREY_ALPHA: 2, RGBA: 4}
WIDTH, LENGTH, BITS, COMPRESSION, PHOTOMETRIC, FILL_ORDER = 256, 257, 258, 259, 262, 266
SAMPLES, PLANAR, PREDICTOR, COLOR_MAP, INK_SET, EXTRA, SAMPLE_FORMAT = 277, 284, 317, 320, 332, 338, 339
SUBSAMPLING = 530
_OFFSETS, _BYTE_COUNTS = 273, 279


def pack(rows: Sequence[Sequence[int]], bits: int, order: str = ">") -> list[bytes]:
    """Rows of samples to bytes: whole ones in a byte order, parts of bytes from the highest bit on."""
    if bits % 8 == 0:
        code = {8: "B", 16: "H", 32: "I"}[bits]
        return [struct.pack(f"{order}{len(row)}{code}", *row) for row in rows]
    texts = ["".join(f"{value:0{bits}b}" for value in row) for row in rows]
    padded = [text.ljust(-(-len(text) // 8) * 8, "0") for text in texts]
    return [bytes(int(text[at : at + 8], 2) for at in range(0, len(text), 8)) for text in padded]


def png_chunk(kind: bytes, body: bytes, crc_error: int = 0) -> bytes:
    checksum = zlib.crc32(kind + body) ^ crc_error
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", checksum)


def png(
    rows: Sequence[Sequence[int]],
    bits: int = 8,
    colour: int = RGB,
    before: bytes = b"",
    after: bytes = b"",
    idat_crc_error: int = 0,
) -> bytes:
    """A PNG file; ``before`` and ``after`` are chunks on either side of the pixels."""
    width = len(rows[0]) // _CHANNELS[colour]
    header = struct.pack(">IIBBBBB", width, len(rows), bits, colour, 0, 0, 0)
    pixels = zlib.compress(b"".join(b"\0" + row for row in pack(rows, bits)))
    return (
        PNG_SIGNATURE
        + png_chunk(b"IHDR", header)
        + before
        + png_chunk(b"IDAT", pixels, idat_crc_error)
        + after
        + png_chunk(b"IEND", b"")
    )


def tiff(tags: Tags, pixels: bytes | Sequence[bytes], order: str = "<", is_big: bool = False) -> bytes:
    """A TIFF file of the given strips; all values are written as 16-bit numbers."""
    strips = [pixels] if isinstance(pixels, bytes) else list(pixels)
    mark = b"II" if order == "<" else b"MM"
    head = (
        struct.pack(order + "2sHHHQ", mark, 43, 8, 0, 16)
        if is_big
        else struct.pack(order + "2sHI", mark, 42, 8)
    )
    count, offset, room = ("Q", "Q", 8) if is_big else ("H", "I", 4)
    entries = len(tags) + 2
    start = len(head) + struct.calcsize(f"{order}{count}") + entries * (4 + 2 * room) + room
    starts = [start + sum(map(len, strips[:index])) for index in range(len(strips))]
    values = {tag: ("H", tuple(numbers)) for tag, numbers in tags.items()}
    values |= {_OFFSETS: ("I", tuple(starts)), _BYTE_COUNTS: ("I", tuple(map(len, strips)))}
    directory, payload = b"", b"".join(strips)
    for tag, (code, numbers) in sorted(values.items()):
        packed = struct.pack(f"{order}{len(numbers)}{code}", *numbers)
        if len(packed) > room:
            place = struct.pack(order + offset, start + len(payload))
            payload += packed
            packed = place
        kind = {"H": 3, "I": 4}[code]
        directory += struct.pack(order + "HH" + offset, tag, kind, len(numbers)) + packed.ljust(room, b"\0")
    return head + struct.pack(order + count, entries) + directory + bytes(room) + payload


def jpeg_with(data: bytes, *segments: tuple[int, bytes]) -> bytes:
    """A JPEG file with further segments after its start."""
    added = (struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body for marker, body in segments)
    return data[:2] + b"".join(added) + data[2:]
