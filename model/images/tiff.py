"""TIFF files reduced to the pixels of their first picture, as Pillow gets them.

A TIFF file is a directory of tags. Damaged metadata among them could cost the photo, and some layouts of
pixels are known to be misread; so the directory is written anew with the tags that pixels need, layouts
that Pillow misreads are put in a way that it reads rightly, or refused with their names.
"""

import struct
from collections.abc import Mapping
from dataclasses import dataclass

from model.errors import ImageError

_WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC = 256, 257, 258, 259, 262
_SAMPLES, _PLANAR, _INK_SET, _EXTRA, _FORMAT, _PROFILE = 277, 284, 332, 338, 339, 34675
_FILL_ORDER, _SUBSAMPLING = 266, 530
_PIXEL_TAGS = frozenset(
    {_WIDTH, _LENGTH, _BITS, _COMPRESSION, _PHOTOMETRIC, _FILL_ORDER, _SAMPLES, _PLANAR, _INK_SET, _EXTRA}
    | {_FORMAT, _SUBSAMPLING, _PROFILE}
    | {273, 278, 279}  # strips
    | {322, 323, 324, 325}  # tiles
    | {274, 292, 293, 317, 320}  # orientation, fax options, predictor, palette
    | {347, 529, 531, 532, *range(512, 522)}  # JPEG and YCbCr
)
_TYPE_BYTES = {1: 1, 2: 1, 3: 2, 4: 4, 5: 8, 6: 1, 7: 1, 8: 2, 9: 4, 10: 8, 11: 4, 12: 8, 13: 4}
_TYPE_BYTES |= {16: 8, 17: 8, 18: 8}  # of BigTIFF
_NUMBERS = {1: "B", 3: "H", 4: "I", 13: "I", 16: "Q"}
_MAX_SAMPLES = 16
_MAX_ENTRIES = 4096
_WHITE_IS_ZERO, _BLACK_IS_ZERO, _RGB, _CMYK, _YCBCR = 0, 1, 2, 5, 6
_UNSIGNED, _SIGNED, _FLOAT = 1, 2, 3
_SEPARATE = 2
_RAW = 1
_JPEG = frozenset({6, 7})
_COMPRESSIONS = frozenset({_RAW, 2, 3, 4, 5, 6, 7, 8, 32773, 32946, 34925, 50000})
"""None, fax, LZW, JPEG, Deflate, PackBits, LZMA and Zstandard: what Pillow's wheels are built with."""
_PHOTOMETRICS = {
    0: "grey, white is zero",
    1: "grey",
    2: "RGB",
    3: "palette",
    4: "mask",
    5: "CMYK",
    6: "YCbCr",
    8: "Lab",
}
_FORMATS = {_SIGNED: "signed", _FLOAT: "floating point"}


@dataclass(frozen=True)
class TiffFile:
    """A TIFF file for Pillow.

    Attributes:
        data: the file, with a directory of the first picture's pixels.
        white: of grey pixels that Pillow gives as they are stored, the value of white; else None.
        is_negative: whether those grow darker with their value.
        layout: the pixels' format, in words.
    """

    data: bytes
    white: int | None
    is_negative: bool
    layout: str


@dataclass(frozen=True)
class _Form:
    """How a file writes numbers: byte order, and the widths of classic TIFF or BigTIFF."""

    order: str
    is_big: bool

    @property
    def count(self) -> str:
        return self.order + ("Q" if self.is_big else "H")

    @property
    def offset(self) -> str:
        return self.order + ("Q" if self.is_big else "I")

    @property
    def entry(self) -> str:
        return self.order + ("HHQ8s" if self.is_big else "HHI4s")


@dataclass(frozen=True)
class _Entry:
    """One tag: its type, the number of its values, and the values or where they are."""

    tag: int
    kind: int
    count: int
    value: bytes


def strip_tiff(data: bytes) -> TiffFile:
    """Write the first directory anew, in a form that Pillow reads rightly.

    Raises:
        ImageError: a layout that is not read; names it.
        OSError: the directory is damaged.
    """
    form = _Form("<" if data[:2] == b"II" else ">", data[2:4] in (b"+\0", b"\0+"))
    try:
        entries, following = _read_directory(data, form)
        numbers = {tag: _numbers(data, form, entry) for tag, entry in entries.items() if _is_short(entry)}
    except struct.error as exc:
        raise OSError("its directory is cut off") from exc
    if not {_WIDTH, _LENGTH} <= numbers.keys():
        raise OSError("its directory states no size")
    layout = _describe(numbers)
    if form == _Form(">", is_big=True):
        raise ImageError(f"is a big-endian BigTIFF file, which is not read ({layout})")
    _refuse_misread(numbers, layout)
    bits = _first(numbers, _BITS, 1)
    photometric = _first(numbers, _PHOTOMETRIC, _WHITE_IS_ZERO)
    if _first(numbers, _SAMPLES, 1) == 1:
        entries.pop(_PLANAR, None)  # one plane is one plane
    is_wide_grey = photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO) and bits in (12, 16)
    if is_wide_grey and photometric == _WHITE_IS_ZERO:  # Pillow knows this in one of two byte orders
        entries[_PHOTOMETRIC] = _short(form, _PHOTOMETRIC, _BLACK_IS_ZERO)
    return TiffFile(
        _write_directory(data, form, entries, following),
        white=2**bits - 1 if is_wide_grey else None,
        is_negative=photometric == _WHITE_IS_ZERO,
        layout=layout,
    )


def _read_directory(data: bytes, form: _Form) -> tuple[dict[int, _Entry], int]:
    """The pixels' entries of the first directory, and where the next directory is."""
    (start,) = struct.unpack_from(form.offset, data, 8 if form.is_big else 4)
    (count,) = struct.unpack_from(form.count, data, start)
    if count > _MAX_ENTRIES:
        raise OSError(f"its directory has {count} entries")
    position = start + struct.calcsize(form.count)
    entries: dict[int, _Entry] = {}
    for _ in range(count):
        entry = _Entry(*struct.unpack_from(form.entry, data, position))
        if entry.tag in _PIXEL_TAGS and entry.tag not in entries and _lies_within(entry, data, form):
            entries[entry.tag] = entry
        position += struct.calcsize(form.entry)
    return entries, struct.unpack_from(form.offset, data, position)[0]


def _lies_within(entry: _Entry, data: bytes, form: _Form) -> bool:
    num_bytes = _TYPE_BYTES.get(entry.kind, 0) * entry.count
    if num_bytes <= len(entry.value):
        return num_bytes > 0
    return struct.unpack_from(form.offset, entry.value)[0] + num_bytes <= len(data)


def _is_short(entry: _Entry) -> bool:
    return entry.kind in _NUMBERS and entry.count <= _MAX_SAMPLES


def _numbers(data: bytes, form: _Form, entry: _Entry) -> tuple[int, ...]:
    pattern = f"{form.order}{entry.count}{_NUMBERS[entry.kind]}"
    if struct.calcsize(pattern) <= len(entry.value):
        return struct.unpack_from(pattern, entry.value)
    return struct.unpack_from(pattern, data, struct.unpack_from(form.offset, entry.value)[0])


def _first(numbers: Mapping[int, tuple[int, ...]], tag: int, default: int) -> int:
    return numbers.get(tag, (default,))[0]


def _describe(numbers: Mapping[int, tuple[int, ...]]) -> str:
    """The layout in words, such as ``grey of 16 bits, signed``."""
    photometric = _first(numbers, _PHOTOMETRIC, _WHITE_IS_ZERO)
    bits = numbers.get(_BITS, (1,))
    words = [
        f"{_PHOTOMETRICS.get(photometric, f'photometric {photometric}')} of "
        f"{'/'.join(str(b) for b in sorted(set(bits)))} bits"
    ]
    kinds = set(numbers.get(_FORMAT, (_UNSIGNED,)))
    words += [_FORMATS.get(kind, f"sample format {kind}") for kind in sorted(kinds - {_UNSIGNED})]
    if _EXTRA in numbers:
        words.append(f"{len(numbers[_EXTRA])} extra samples of type {numbers[_EXTRA][0]}")
    if _first(numbers, _PLANAR, 1) == _SEPARATE:
        words.append("in separate planes")
    if _first(numbers, _INK_SET, 1) != 1:
        words.append("of other inks")
    if photometric == _YCBCR and numbers.get(_SUBSAMPLING, (2, 2)) != (1, 1):
        words.append("subsampled")
    if _is_reversed(numbers):
        words.append("with reversed bits")
    if _first(numbers, _COMPRESSION, _RAW) == _RAW:
        words.append("uncompressed")
    if _first(numbers, _COMPRESSION, _RAW) not in _COMPRESSIONS:
        words.append(f"compressed by method {numbers[_COMPRESSION][0]}")
    return ", ".join(words)


def _is_reversed(numbers: Mapping[int, tuple[int, ...]]) -> bool:
    return _first(numbers, _FILL_ORDER, 1) == 2


def _refuse_misread(numbers: Mapping[int, tuple[int, ...]], layout: str) -> None:
    """Refuse what Pillow cannot read, or would give wrong pixels of without a word."""
    photometric = _first(numbers, _PHOTOMETRIC, _WHITE_IS_ZERO)
    is_grey = photometric in (_WHITE_IS_ZERO, _BLACK_IS_ZERO)
    extra, bits = numbers.get(_EXTRA, ()), _first(numbers, _BITS, 1)
    is_raw = _first(numbers, _COMPRESSION, _RAW) == _RAW
    has_planes = _first(numbers, _PLANAR, 1) == _SEPARATE and _first(numbers, _SAMPLES, 1) > 1
    is_read = (
        _first(numbers, _COMPRESSION, _RAW) in _COMPRESSIONS
        and _first(numbers, _FORMAT, _UNSIGNED) != _SIGNED
        and not (_first(numbers, _COMPRESSION, _RAW) in _JPEG and set(numbers.get(_BITS, ())) - {8})
        and not (photometric == _CMYK and _first(numbers, _INK_SET, 1) != 1)
        and not (photometric == _YCBCR and is_raw and numbers.get(_SUBSAMPLING, (2, 2)) != (1, 1))
        and not (photometric == _WHITE_IS_ZERO and is_raw and _is_reversed(numbers) and bits == 8)
        and not (has_planes and is_grey and set(extra) != {0})
        and not (has_planes and photometric == _YCBCR and extra)
    )
    if has_planes and is_raw:
        is_read &= set(numbers.get(_BITS, ())) == {8} and photometric in (_RGB, _CMYK) and extra in ((), (2,))
    if not is_read:
        raise ImageError(f"is a TIFF file of a layout that is not read: {layout}")


def _short(form: _Form, tag: int, value: int) -> _Entry:
    return _Entry(tag, 3, 1, struct.pack(form.order + "H", value).ljust(8 if form.is_big else 4, b"\0"))


def _write_directory(data: bytes, form: _Form, entries: Mapping[int, _Entry], following: int) -> bytes:
    """The file with a new first directory at its end."""
    padding = b"\0" * (-len(data) % 8)
    start = len(data) + len(padding)
    packed = [struct.pack(form.entry, e.tag, e.kind, e.count, e.value) for _, e in sorted(entries.items())]
    header_bytes = 8 if form.is_big else 4
    return b"".join(
        [
            data[:header_bytes],
            struct.pack(form.offset, start),
            data[header_bytes + struct.calcsize(form.offset) :],
            padding,
            struct.pack(form.count, len(packed)),
            *packed,
            struct.pack(form.offset, following),
        ]
    )
