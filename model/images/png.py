"""PNG files without the chunks that could cost the photo, as Pillow gets them.

Pillow refuses a whole picture for a long text chunk, a damaged comment or a wrong checksum in metadata.
Here, as in browsers, such a chunk is dropped, and only what the pixels need can make a file damaged.
"""

import struct
import zlib
from dataclasses import dataclass

MAX_PROFILE_BYTES = 64 * 2**20
"""Of an ICC profile, unpacked; the picture of a larger one is shown without it."""
MAX_TEXT_BYTES = 2**20
"""Of a text that may state the orientation, unpacked; Pillow takes no longer one."""
MAX_CHUNKS = 2**18
"""Chunks of 256 bytes in the largest body: more are an attack, at a microsecond each."""

_SIGNATURE_BYTES = 8
_CRITICAL = frozenset({b"IHDR", b"PLTE", b"IDAT", b"IEND"})
_SIZES = {b"gAMA": 4, b"sRGB": 1, b"acTL": 8, b"fcTL": 26}
_FRAMES = frozenset({b"fcTL", b"fdAT"})
_ORIENTATION_TEXTS = (b"Raw profile type exif\0", b"XML:com.adobe.xmp\0")
_GREY, _RGB, _PALETTE = 0, 2, 3


@dataclass(frozen=True)
class PngFile:
    """A PNG file for Pillow.

    Attributes:
        data: the file without the chunks that a picture can do without.
        icc_profile: unpacked.
        wide_key: the colour that is transparent in a picture of 16 bits per channel, if any.
    """

    data: bytes
    icc_profile: bytes | None
    wide_key: tuple[int, int, int] | None


def strip_png(data: bytes) -> PngFile:
    """Drop the chunks that the pixels do not need.

    Raises:
        OSError: the file is cut off, a chunk that the pixels need is damaged, or there are too many chunks.
    """
    view = memoryview(data)
    kept: list[memoryview | bytes] = [view[:_SIGNATURE_BYTES]]
    profile = wide_key = None
    texts: set[bytes] = set()
    position, kind, is_animated = _SIGNATURE_BYTES, b"", False
    for _ in range(MAX_CHUNKS):
        if kind == b"IEND":
            break
        body, kind, end = _read_chunk(view, position)
        if body is None or _is_useless(kind, body) or (kind in _FRAMES and not is_animated):
            pass
        elif kind == b"iCCP":
            profile = profile or _read_profile(body)
        elif kind == b"tRNS":
            kept.append(_transparency(body, bit_depth=data[24], colour_type=data[25]))
            if (data[24], data[25]) == (16, _RGB) and len(body) == 6:
                wide_key = struct.unpack(">3H", body)
        elif kind not in (b"tEXt", b"zTXt", b"iTXt"):
            is_animated |= kind == b"acTL"
            kept.append(view[position:end])
        elif (keyword := _orientation_keyword(kind, body)) and keyword not in texts:
            texts.add(keyword)
            kept.append(view[position:end])
        position = end
    else:
        raise OSError(f"it has more than {MAX_CHUNKS} chunks")
    return PngFile(b"".join(kept), profile, wide_key)


def _read_chunk(view: memoryview, position: int) -> tuple[bytes | memoryview | None, bytes, int]:
    """Contents, kind and end of the chunk at a position; no contents where they are damaged metadata."""
    if position + 12 > len(view):
        raise OSError("its end is missing")
    num_bytes, kind = struct.unpack_from(">I4s", view, position)
    end = position + 12 + num_bytes
    if end > len(view):
        raise OSError(f"it ends within its {_shown(kind)} chunk")
    body = view[position + 8 : end - 4]
    is_whole = zlib.crc32(view[position + 4 : end - 4]) == int.from_bytes(view[end - 4 : end])
    if kind in _CRITICAL and not is_whole:
        raise OSError(f"the checksum of its {_shown(kind)} chunk is wrong")
    if not kind.isalpha():
        raise OSError(f"it has a chunk {_shown(kind)}")
    if kind not in _CRITICAL and kind[:1].isupper():
        raise OSError(f"it needs the chunk {_shown(kind)}, which is not a standard one")
    if position == _SIGNATURE_BYTES and (kind != b"IHDR" or num_bytes != 13):
        raise OSError("it does not begin with a header")
    return (body if is_whole else None), kind, end


def _is_useless(kind: bytes, body: bytes | memoryview) -> bool:
    """Whether a chunk is of no use for the pixels, or not of the size that it must have."""
    if kind in _SIZES:
        return len(body) != _SIZES[kind]
    known = _CRITICAL | _FRAMES | {b"iCCP", b"tRNS", b"eXIf", b"tEXt", b"zTXt", b"iTXt"}
    return kind not in known


def _transparency(body: bytes | memoryview, bit_depth: int, colour_type: int) -> bytes:
    """The tRNS chunk as Pillow needs it, its grey on the scale of the pixels; empty if damaged."""
    if colour_type == _PALETTE:
        return _chunk(b"tRNS", bytes(body[:256])) if len(body) else b""
    num_channels = {_GREY: 1, _RGB: 3}.get(colour_type)
    if num_channels is None or len(body) != 2 * num_channels:
        return b""
    largest = 2**bit_depth - 1
    values = [value & largest for value in struct.unpack(f">{num_channels}H", body)]
    if colour_type == _GREY and bit_depth in (2, 4):
        values = [value * 255 // largest for value in values]
    return _chunk(b"tRNS", struct.pack(f">{num_channels}H", *values))


def _chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def _read_profile(body: bytes | memoryview) -> bytes | None:
    _, separator, rest = bytes(body).partition(b"\0")
    if not separator or rest[:1] != b"\0":  # the one method of compression that there is
        return None
    return inflate(rest[1:], MAX_PROFILE_BYTES)


def _orientation_keyword(kind: bytes, body: bytes | memoryview) -> bytes | None:
    """The keyword of a text that may state the orientation and that Pillow can take."""
    keyword = next((text for text in _ORIENTATION_TEXTS if body[: len(text)] == text), None)
    if keyword is None or len(body) > MAX_TEXT_BYTES:
        return None
    rest = bytes(body[len(keyword) :])
    is_packed = kind == b"zTXt" or (kind == b"iTXt" and rest[:1] != b"\0")
    if is_packed and (kind == b"iTXt" or rest[:1] != b"\0" or not inflate(rest[1:], MAX_TEXT_BYTES)):
        return None
    return keyword


def inflate(data: bytes, limit: int) -> bytes | None:
    """Unpack zlib data; None if it is damaged or unpacks to more than ``limit`` bytes."""
    try:
        unpacker = zlib.decompressobj()
        unpacked = unpacker.decompress(data, limit)
    except zlib.error:
        return None
    return None if unpacker.unconsumed_tail or not unpacker.eof else unpacked


def _shown(kind: bytes) -> str:
    return repr(kind.decode("latin-1"))
