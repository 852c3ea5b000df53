"""The cost of decoding an image file, bounded from its bytes before any pixel is decoded.

A header may hide the cost of a file: a tile larger than its picture, a JPEG of hundreds of scans, an
animation of a million frames. `measure_picture` reads the size and the tiles, in bounded time and without
Pillow; `check_parts` counts frames and scans, and stops counting at the limit.
"""

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

from model.errors import PictureCostError

MAX_FRAMES = 1000
"""Frames of an animation or pages of a TIFF file, of which the first is taken."""
MAX_SCANS = 100
"""Scans of a JPEG file. Encoders write about ten; each one costs a pass over the whole picture."""
_MAX_SEGMENTS = 4096  # of a JPEG file: 64 MiB of metadata are 1024
_MAX_JUNK = 2**16  # bytes between two segments of a JPEG file, where there should be none
_GIF_HEAD_BYTES = 2**16  # in which the first frame is looked for
_MAX_TAGS = 1024  # of a TIFF directory: there are some hundred tags

_JPEG_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")
"""Any marker but a restart; the data of a scan holds none."""
_JPEG_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_JPEG_SCAN, _JPEG_END = 0xDA, 0xD9
_JPEG_BARE = frozenset({0x01, 0xD8})  # markers without a length

_TIFF_INTEGERS = {1: 1, 3: 2, 4: 4, 6: 1, 8: 2, 9: 4, 16: 8, 17: 8}
"""Bytes of an integer by its type."""
_TIFF_WIDTH, _TIFF_HEIGHT, _TIFF_TILE_WIDTH, _TIFF_TILE_HEIGHT = 256, 257, 322, 323


@dataclass(frozen=True)
class Extent:
    """Size of a picture, pixels, and the pixels that its decoder computes: with tiles they are more."""

    width: int
    height: int
    coded_pixels: int


def measure_picture(data: bytes) -> Extent | None:
    """Size of a JPEG, PNG, WebP, GIF, BMP or TIFF file by its header; None where the header does not tell.

    Raises:
        PictureCostError: a header of too many segments.
    """
    for magic, measure in _MEASURES.items():
        if data.startswith(magic):
            try:
                return measure(data)
            except (struct.error, IndexError):
                return None  # truncated
    return None


def check_parts(data: bytes, max_frames: int = MAX_FRAMES, max_scans: int = MAX_SCANS) -> None:
    """Count the frames of a GIF or TIFF file and the scans of a JPEG file.

    Raises:
        PictureCostError: there are more than allowed.
    """
    try:
        if data.startswith(b"GIF8"):
            _check_count(_gif_frames(data), max_frames, "frames")
        elif data.startswith((b"II", b"MM")):
            _check_count(_tiff_directories(data), max_frames, "frames")
        elif data.startswith(b"\xff\xd8"):
            segments = _jpeg_segments(data)
            _check_count((code for code, _ in segments if code == _JPEG_SCAN), max_scans, "scans")
    except (struct.error, IndexError):
        return  # truncated: there are no more


def _check_count(parts: Iterator[object], most: int, name: str) -> None:
    if sum(1 for _ in islice(parts, most + 1)) > most:
        raise PictureCostError(f"has more than {most} {name}, the most that are accepted")


def _plain(width: int, height: int) -> Extent:
    return Extent(width, height, width * height)


def _measure_png(data: bytes) -> Extent:
    return _plain(*struct.unpack_from(">II", data, 16))


def _measure_gif(data: bytes) -> Extent:
    """Of the screen, which grows where the first frame does not fit."""
    width, height = struct.unpack_from("<HH", data, 6)
    try:
        frame = next(_gif_frames(data[:_GIF_HEAD_BYTES]), None)
    except IndexError:
        frame = None  # it comes late, or never
    if frame is not None:
        left, top, frame_width, frame_height = struct.unpack_from("<HHHH", data, frame + 1)
        width, height = max(width, left + frame_width), max(height, top + frame_height)
    return _plain(width, height)


def _measure_bmp(data: bytes) -> Extent:
    (header_bytes,) = struct.unpack_from("<I", data, 14)
    width, height = struct.unpack_from("<HH" if header_bytes == 12 else "<ii", data, 18)
    return _plain(abs(width), abs(height))


def _measure_webp(data: bytes) -> Extent | None:
    chunk = data[12:16]
    if chunk == b"VP8X":
        width, height = (int.from_bytes(data[start : start + 3], "little") + 1 for start in (24, 27))
        return _plain(width, height)
    if chunk == b"VP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        return _plain((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if chunk == b"VP8 ":
        width, height = struct.unpack_from("<HH", data, 26)
        return _plain(width & 0x3FFF, height & 0x3FFF)
    return None


def _measure_jpeg(data: bytes) -> Extent | None:
    for code, start in _jpeg_segments(data):
        if code in _JPEG_FRAMES:
            height, width = struct.unpack_from(">HH", data, start + 3)
            return _plain(width, height)
        if code == _JPEG_SCAN:
            break
    return None


def _jpeg_segments(data: bytes) -> Iterator[tuple[int, int]]:
    """Marker and position of each segment up to the end of the image.

    Raises:
        PictureCostError: too many of them.
    """
    position, in_scan = 2, False
    for _ in range(_MAX_SEGMENTS):
        marker = _JPEG_MARKER.search(data, position, len(data) if in_scan else position + _MAX_JUNK)
        if marker is None or (code := data[marker.end() - 1]) == _JPEG_END:
            return
        position, in_scan = marker.end(), code == _JPEG_SCAN
        yield code, position
        if code not in _JPEG_BARE:
            (num_bytes,) = struct.unpack_from(">H", data, position)
            position += num_bytes
    raise PictureCostError(f"has more than {_MAX_SEGMENTS} segments, the most that are accepted")


def _gif_frames(data: bytes) -> Iterator[int]:
    """Position of each frame."""
    position = 13 + _gif_palette_bytes(data[10])
    while (kind := data[position]) != 0x3B:
        if kind == 0x2C:
            yield position
            position += 11 + _gif_palette_bytes(data[position + 9])
        elif kind == 0x21:
            position += 2
        else:
            position += 1  # Pillow skips what is neither
            continue
        while num_bytes := data[position]:
            position += 1 + num_bytes
        position += 1


def _gif_palette_bytes(flags: int) -> int:
    return 3 * 2 ** (1 + (flags & 7)) if flags & 0x80 else 0


@dataclass(frozen=True)
class _TiffForm:
    """How a classic or a BigTIFF file is laid out: byte order, and formats of counts and offsets."""

    order: str
    count: struct.Struct
    entry: struct.Struct
    offset: struct.Struct
    first: int

    @classmethod
    def of(cls, data: bytes) -> "_TiffForm":
        order = "<" if data[:1] == b"I" else ">"
        is_big = data[2:4] in (b"+\0", b"\0+")
        formats = ("Q", "HHQ8s", "Q") if is_big else ("H", "HHI4s", "I")
        count, entry, offset = (struct.Struct(order + text) for text in formats)
        return cls(order, count, entry, offset, first=8 if is_big else 4)


def _measure_tiff(data: bytes) -> Extent | None:
    tags = _tiff_integers(data)
    width, height = tags.get(_TIFF_WIDTH, 0), tags.get(_TIFF_HEIGHT, 0)
    if not width or not height:
        return None
    tile_width, tile_height = tags.get(_TIFF_TILE_WIDTH, 0), tags.get(_TIFF_TILE_HEIGHT, 0)
    if not tile_width or not tile_height:
        return _plain(width, height)
    num_tiles = -(-width // tile_width) * -(-height // tile_height)
    return Extent(width, height, num_tiles * tile_width * tile_height)


def _tiff_integers(data: bytes) -> dict[int, int]:
    """The first directory's integers by tag; of several with one tag the largest."""
    form = _TiffForm.of(data)
    (start,) = form.offset.unpack_from(data, form.first)
    (num_entries,) = form.count.unpack_from(data, start)
    values: dict[int, int] = {}
    if num_entries > _MAX_TAGS:
        return values
    for index in range(num_entries):
        place = start + form.count.size + index * form.entry.size
        tag, kind, _, value = form.entry.unpack_from(data, place)
        num_bytes = _TIFF_INTEGERS.get(kind)
        if num_bytes is None or tag > _TIFF_TILE_HEIGHT:
            continue
        if num_bytes > len(value):
            (place,) = form.offset.unpack(value)
            value = data[place : place + num_bytes]
        number = int.from_bytes(value[:num_bytes], "little" if form.order == "<" else "big")
        values[tag] = max(number, values.get(tag, 0))
    return values


def _tiff_directories(data: bytes) -> Iterator[int]:
    """Position of each directory, of which a page has one; they may go in a circle."""
    form = _TiffForm.of(data)
    seen: set[int] = {0}
    (position,) = form.offset.unpack_from(data, form.first)
    while position not in seen:
        seen.add(position)
        yield position
        (num_entries,) = form.count.unpack_from(data, position)
        (position,) = form.offset.unpack_from(
            data, position + form.count.size + num_entries * form.entry.size
        )


_MEASURES: dict[bytes | tuple[bytes, ...], Callable[[bytes], Extent | None]] = {
    b"\xff\xd8\xff": _measure_jpeg,
    b"\x89PNG\r\n\x1a\n": _measure_png,
    b"RIFF": _measure_webp,
    b"GIF8": _measure_gif,
    b"BM": _measure_bmp,
    (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+"): _measure_tiff,
}
