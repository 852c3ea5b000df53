"""Layouts of TIFF pixels: read rightly, or refused with their names."""

import contextlib
import itertools
import struct
import zlib

import numpy as np
import pytest

from model.errors import ImageError
from model.images.files import DECODER_ERRORS
from model.images.opening import open_picture
from tests.model.image_files import (
    BITS,
    COMPRESSION,
    EXTRA,
    FILL_ORDER,
    LENGTH,
    PHOTOMETRIC,
    PLANAR,
    SAMPLE_FORMAT,
    SAMPLES,
    SUBSAMPLING,
    WIDTH,
    pack,
    tiff,
)

SIDE = 8
DARK, LIGHT = (64,) * 3, (191,) * 3
WHITE_IS_ZERO, BLACK_IS_ZERO, RGB, PALETTE, CMYK, YCBCR, LAB = 0, 1, 2, 3, 5, 6, 8
ORDERS = pytest.mark.parametrize("order", ["<", ">"])
COMPRESSIONS = pytest.mark.parametrize("compression", [1, 8], ids=["raw", "deflate"])
REFUSED = "layout that is not read"


def file_of(
    left: list[int],
    right: list[int],
    bits: int,
    photometric: int,
    order: str = "<",
    compression: int = 1,
    is_big: bool = False,
    **options: object,
) -> bytes:
    """A picture of two halves, by the samples of their pixels; further tags as ``tag_338=[1]``."""
    rows = pack([left * (SIDE // 2) + right * (SIDE // 2)] * SIDE, bits, order)
    pixels = b"".join(rows)
    tags = {
        WIDTH: [SIDE],
        LENGTH: [SIDE],
        BITS: [bits] * len(left),
        COMPRESSION: [compression],
        PHOTOMETRIC: [photometric],
        SAMPLES: [len(left)],
    }
    tags |= {int(name.removeprefix("tag_")): value for name, value in options.items()}
    return tiff(tags, zlib.compress(pixels) if compression == 8 else pixels, order, is_big)


def halves(data: bytes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    with open_picture(data) as picture:
        pixels = np.asarray(picture.read())
    assert pixels.shape == (SIDE, SIDE, 3)
    assert (pixels[:, :4] == pixels[0, 0]).all()
    assert (pixels[:, 4:] == pixels[0, -1]).all()
    return tuple(pixels[0, 0].tolist()), tuple(pixels[0, -1].tolist())


def assert_near(data: bytes, left: tuple[int, ...], right: tuple[int, ...], atol: int = 1) -> None:
    found = halves(data)
    assert found[0] == pytest.approx(left, abs=atol)
    assert found[1] == pytest.approx(right, abs=atol)


def assert_right_or_refused(data: bytes, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    with contextlib.suppress(ImageError):
        assert_near(data, left, right, atol=3)


@ORDERS
@COMPRESSIONS
@pytest.mark.parametrize("photometric", [WHITE_IS_ZERO, BLACK_IS_ZERO])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_grey(order: str, compression: int, photometric: int, bits: int) -> None:
    largest = 2**bits - 1
    low = round(largest * 64 / 255)
    low, high = (largest - low, low) if photometric == WHITE_IS_ZERO else (low, largest - low)
    data = file_of([low], [high], bits, photometric, order, compression)
    shade = 0 if bits == 1 else round(round(largest * 64 / 255) * 255 / largest)
    assert_near(data, (shade,) * 3, (255 - shade,) * 3)


@COMPRESSIONS
@pytest.mark.parametrize("photometric", [WHITE_IS_ZERO, BLACK_IS_ZERO])
def test_grey_of_12_bits(compression: int, photometric: int) -> None:
    values = [4095 - 1024, 1024] if photometric == WHITE_IS_ZERO else [1024, 4095 - 1024]
    assert_near(file_of(values[:1], values[1:], 12, photometric, "<", compression), DARK, LIGHT)


@ORDERS
@COMPRESSIONS
@pytest.mark.parametrize("photometric", [WHITE_IS_ZERO, BLACK_IS_ZERO])
@pytest.mark.parametrize("bits", [10, 12, 14, 32])
def test_grey_of_other_depths_is_never_wrong(
    order: str, compression: int, photometric: int, bits: int
) -> None:
    values = [round((2**bits - 1) * shade / 255) for shade in (64, 191)]
    if photometric == WHITE_IS_ZERO:
        values.reverse()
    data = file_of(values[:1], values[1:], bits, photometric, order, compression)
    assert_right_or_refused(data, DARK, LIGHT)


@ORDERS
@COMPRESSIONS
@pytest.mark.parametrize("is_big", [False, True])
def test_big_tiff_is_tiff(order: str, compression: int, is_big: bool) -> None:
    data = file_of([64, 120, 40], [191, 10, 20], 8, RGB, order, compression, is_big)
    if is_big and order == ">":
        with pytest.raises(ImageError, match="big-endian BigTIFF"):
            halves(data)
    else:
        assert halves(data) == ((64, 120, 40), (191, 10, 20))


@ORDERS
@COMPRESSIONS
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("photometric", [BLACK_IS_ZERO, RGB])
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_extra_samples(order: str, compression: int, bits: int, photometric: int, extra: int) -> None:
    """Of type 1 colours are already multiplied by alpha; of type 0 it is no alpha at all."""
    scale = (2**bits - 1) // 255
    count = 3 if photometric == RGB else 1
    shade = 50 if extra == 1 else 100
    left, right = [shade * scale] * count + [128 * scale], [200 * scale] * count + [255 * scale]
    data = file_of(left, right, bits, photometric, order, compression, tag_338=[extra])
    expected = 100 if extra == 0 else 50 + 127
    if photometric == BLACK_IS_ZERO and bits == 16:
        with pytest.raises(ImageError, match=REFUSED):
            halves(data)
    else:
        assert_near(data, (expected,) * 3, (200,) * 3, atol=2)


@ORDERS
@COMPRESSIONS
@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("photometric", [RGB, CMYK, YCBCR, BLACK_IS_ZERO])
@pytest.mark.parametrize("extra", [None, 0, 1, 2])
def test_separate_planes_are_never_wrong(
    order: str, compression: int, bits: int, photometric: int, extra: int | None
) -> None:
    scale = (2**bits - 1) // 255
    left, right, *expected = {
        RGB: ([64, 120, 40], [191, 10, 20], (64, 120, 40), (191, 10, 20)),
        CMYK: ([191, 135, 215, 0], [64, 245, 235, 0], (64, 120, 40), (191, 10, 20)),
        YCBCR: ([64, 128, 128], [191, 128, 128], DARK, LIGHT),
        BLACK_IS_ZERO: ([64], [191], DARK, LIGHT),
    }[photometric]
    if extra is not None:
        left, right = [*left, 255], [*right, 255]
    rows = [[[a * scale] * 4 + [b * scale] * 4] * SIDE for a, b in zip(left, right, strict=True)]
    planes = [b"".join(pack(plane, bits, order)) for plane in rows]
    tags = {WIDTH: [SIDE], LENGTH: [SIDE], BITS: [bits] * len(left), COMPRESSION: [compression]}
    tags |= {PHOTOMETRIC: [photometric], SAMPLES: [len(left)], PLANAR: [2], SUBSAMPLING: [1, 1]}
    if extra is not None:
        tags[EXTRA] = [extra]
    data = tiff(tags, [zlib.compress(plane) for plane in planes] if compression == 8 else planes, order)
    if (photometric, bits, extra) == (RGB, 8, None):
        assert halves(data) == tuple(expected)
    else:
        assert_right_or_refused(data, *expected)


@ORDERS
@COMPRESSIONS
@pytest.mark.parametrize("bits", [8, 16, 32])
@pytest.mark.parametrize("sample_format", [2, 3, 4])
def test_signed_and_floating_point_samples_are_refused(
    order: str, compression: int, bits: int, sample_format: int
) -> None:
    for photometric, count in ((BLACK_IS_ZERO, 1), (RGB, 3)):
        data = file_of(
            [0] * count, [1] * count, bits, photometric, order, compression, tag_339=[sample_format] * count
        )
        with pytest.raises(ImageError, match=f"{REFUSED}|not defined"):
            halves(data)


@ORDERS
@COMPRESSIONS
@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@pytest.mark.parametrize("scale", [257, 1], ids=["of 16 bits", "of 8 bits"])
def test_palettes(order: str, compression: int, bits: int, scale: int) -> None:
    """Old writers store palettes of 8 bits."""
    count = 2**bits
    colours = [[0] * count for _ in range(3)]
    for channel, (first, second) in enumerate(zip((64, 120, 40), (191, 10, 20), strict=True)):
        colours[channel][:2] = [first * scale, second * scale]
    palette = list(itertools.chain(*colours))
    data = file_of([0], [1], bits, PALETTE, order, compression, tag_320=palette)
    assert halves(data) == ((64, 120, 40), (191, 10, 20))


@ORDERS
@COMPRESSIONS
@pytest.mark.parametrize("is_stated", [False, True])
def test_subsampled_ycbcr_is_never_wrong(order: str, compression: int, is_stated: bool) -> None:
    """Two chroma values follow the four lumas of each square; that is also meant where nothing is said."""
    blocks = bytes([64] * 4 + [128] * 2) * 2 + bytes([191] * 4 + [128] * 2) * 2
    pixels = blocks * (SIDE // 2)
    tags = {WIDTH: [SIDE], LENGTH: [SIDE], BITS: [8] * 3, COMPRESSION: [compression], PHOTOMETRIC: [YCBCR]}
    tags |= {SAMPLES: [3]} | ({SUBSAMPLING: [2, 2]} if is_stated else {})
    data = tiff(tags, zlib.compress(pixels) if compression == 8 else pixels, order)
    assert_right_or_refused(data, DARK, LIGHT)


@ORDERS
@COMPRESSIONS
def test_inks_and_lab_are_never_wrong(order: str, compression: int) -> None:
    cmyk = [0, 0, 0, 191], [0, 0, 0, 64]
    assert_near(file_of(*cmyk, 8, CMYK, order, compression), DARK, LIGHT)
    with pytest.raises(ImageError, match="other inks"):
        halves(file_of(*cmyk, 8, CMYK, order, compression, tag_332=[2]))
    assert_right_or_refused(file_of([70, 0, 0], [195, 0, 0], 8, LAB, order, compression), DARK, LIGHT)


@pytest.mark.parametrize("photometric", [WHITE_IS_ZERO, BLACK_IS_ZERO])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@ORDERS
def test_reversed_bits_are_never_wrong(order: str, photometric: int, bits: int) -> None:
    largest = 2**bits - 1
    values = [0, largest] if photometric == BLACK_IS_ZERO else [largest, 0]
    rows = pack([values[:1] * 4 + values[1:] * 4] * SIDE, bits, order)
    reverse = bytes(int(f"{byte:08b}"[::-1], 2) for byte in range(256))
    tags = {WIDTH: [SIDE], LENGTH: [SIDE], BITS: [bits], COMPRESSION: [1], PHOTOMETRIC: [photometric]}
    data = tiff(tags | {FILL_ORDER: [2]}, b"".join(rows).translate(reverse), order)
    assert_right_or_refused(data, (0, 0, 0), (255, 255, 255))


@pytest.mark.parametrize("bits", [[4, 4, 4], [12, 12, 12], [5, 6, 5], [8, 8, 16]])
def test_other_depths_of_colour_are_refused(bits: list[int]) -> None:
    with pytest.raises(ImageError, match=REFUSED):
        halves(file_of([0] * 3, [0] * 3, 16, RGB, tag_258=bits))


@pytest.mark.parametrize("bits", [12, 16])
@pytest.mark.parametrize("compression", [6, 7])
def test_jpegs_of_other_depths_are_refused(bits: int, compression: int) -> None:
    with pytest.raises(ImageError, match=REFUSED):
        halves(file_of([0], [255], bits, BLACK_IS_ZERO, compression=compression))


def test_an_unknown_compression_is_named() -> None:
    with pytest.raises(ImageError, match="compressed by method 50001"):
        halves(file_of([0], [255], 8, BLACK_IS_ZERO, compression=50001))


def test_damaged_metadata_costs_no_photo() -> None:
    """Tags that say nothing of the pixels point out of the file."""
    data = bytearray(
        file_of([64], [191], 8, BLACK_IS_ZERO, tag_282=[1], tag_283=[0], tag_700=[1], tag_34675=[5])
    )
    start, count = struct.unpack_from("<I", data, 4)[0], struct.unpack_from("<H", data, 8)[0]
    for position in range(start + 2, start + 2 + 12 * count, 12):
        if struct.unpack_from("<H", data, position)[0] in (282, 283, 700, 34675):
            struct.pack_into("<HII", data, position + 2, 5, 2**31, 2**32 - 1)
    assert halves(bytes(data)) == (DARK, LIGHT)


@pytest.mark.parametrize("cut", [6, 9, 30, 80])
def test_a_directory_that_is_cut_off_is_damaged(cut: int) -> None:
    with pytest.raises(DECODER_ERRORS):
        halves(file_of([64], [191], 8, BLACK_IS_ZERO)[:cut])


def test_a_file_without_size_is_damaged() -> None:
    with pytest.raises(OSError, match="no size"):
        halves(tiff({BITS: [8]}, b"0"))


def test_sample_format_may_be_stated() -> None:
    assert halves(file_of([64], [191], 8, BLACK_IS_ZERO, **{f"tag_{SAMPLE_FORMAT}": [1]})) == (DARK, LIGHT)
