"""Files to pictures: metadata never costs the photo, and transparent parts are white at every depth."""

import io
import itertools
import struct
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from model.images.files import DECODER_ERRORS
from model.images.opening import open_picture, sniff
from tests.model.image_files import GREY, GREY_ALPHA, PALETTE, RGB, RGBA, jpeg_with, png, png_chunk

ORANGE, TEAL, WHITE = (200, 120, 40), (10, 130, 150), (255, 255, 255)
PHOTO = [ORANGE * 8] * 8
LONG = b"node graph " * 200_000
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def read(data: bytes) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's remarks about metadata
        with open_picture(data) as picture:
            return np.asarray(picture.read())


def halves(data: bytes) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The colours of the left and of the right half."""
    pixels = read(data)
    return tuple(pixels[1, 1].tolist()), tuple(pixels[1, -2].tolist())


def itxt(text: bytes, is_packed: bool) -> bytes:
    return b"workflow\0" + bytes([is_packed, 0]) + b"\0\0" + (zlib.compress(text) if is_packed else text)


TEXT_CHUNKS = {
    "tEXt": png_chunk(b"tEXt", b"workflow\0" + LONG),
    "zTXt": png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(LONG)),
    "iTXt": png_chunk(b"iTXt", itxt(LONG, is_packed=False)),
    "packed iTXt": png_chunk(b"iTXt", itxt(LONG, is_packed=True)),
    "orientation": png_chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(LONG)),
    "XMP": png_chunk(b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(LONG)),
    "bomb": png_chunk(b"zTXt", b"workflow\0\0" + zlib.compress(bytes(2**26))),
    "many": png_chunk(b"tEXt", b"a\0" + b"b" * 10_000) * 8_000,
    "no keyword": png_chunk(b"tEXt", b"workflow"),
    "unknown method": png_chunk(b"zTXt", b"workflow\0\7abc"),
    "not Latin-1": png_chunk(b"iTXt", b"\xff\0\0\0\xff\0\xff\0\xff"),
}


@pytest.mark.parametrize("place", ["before", "after"])
@pytest.mark.parametrize("name", TEXT_CHUNKS)
def test_text_of_any_size_costs_no_png(name: str, place: str) -> None:
    assert halves(png(PHOTO, **{place: TEXT_CHUNKS[name]})) == (ORANGE, ORANGE)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (b"gAMA", b"\0"),
        (b"sRGB", b""),
        (b"pHYs", b"\0\0\1"),
        (b"cHRM", b"\0"),
        (b"tRNS", b"\0"),
        (b"tIME", b""),
        (b"iCCP", b"no end"),
        (b"iCCP", b"name\0\7" + zlib.compress(SRGB)),
        (b"iCCP", b"name\0\0" + zlib.compress(SRGB)[:50]),
        (b"iCCP", b"name\0\0" + zlib.compress(b"no profile")),
        (b"eXIf", b"II*\0\xff\xff\xff\xff"),
        (b"acTL", b"\0"),
        (b"fcTL", bytes(26)),
        (b"prIv", b"anything"),
    ],
    ids=itertools.count(),  # a profile holds the time of its making, and workers must agree on the names
)
def test_damaged_metadata_costs_no_png(kind: bytes, body: bytes) -> None:
    for crc_error in (0, 1):
        assert halves(png(PHOTO, before=png_chunk(kind, body, crc_error))) == (ORANGE, ORANGE)


def test_a_wrong_checksum_counts_where_pixels_depend_on_it() -> None:
    with pytest.raises(DECODER_ERRORS, match="checksum of its 'IDAT'"):
        read(png(PHOTO, idat_crc_error=1))
    palette = png([[0] * 8] * 8, colour=PALETTE, before=png_chunk(b"PLTE", bytes(ORANGE), crc_error=1))
    with pytest.raises(DECODER_ERRORS, match="checksum of its 'PLTE'"):
        read(palette)


@pytest.mark.parametrize("cut", [4, 12, 16, 40])
def test_a_png_that_is_cut_off_is_damaged(cut: int) -> None:
    with pytest.raises(DECODER_ERRORS):
        read(png(PHOTO)[:-cut])


def test_a_png_of_endless_chunks_is_damaged() -> None:
    with pytest.raises(DECODER_ERRORS, match="chunks"):
        read(png(PHOTO, after=png_chunk(b"prIv", b"") * 2**18))


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("stray", [0, 1])
def test_a_transparent_grey_is_white(bits: int, stray: int) -> None:
    """Bits of the key beyond the depth do not count."""
    largest = 2**bits - 1
    value = largest // 3
    key = value + (stray << bits if bits < 16 else 0)
    rows = [[value] * 8 + [0 if bits == 1 else 2 * largest // 3] * 8] * 4
    if bits == 1:
        rows = [[0] * 8 + [1] * 8] * 4
    data = png(rows, bits, GREY, before=png_chunk(b"tRNS", struct.pack(">H", key)))
    assert halves(data) == (WHITE, WHITE if bits == 1 else (170,) * 3)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_transparent_colour_is_white(bits: int) -> None:
    scale = (2**bits - 1) // 255
    key = [value * scale for value in ORANGE]
    other = [*key[:2], key[2] + 1]  # differs in the last bit
    data = png([key * 4 + other * 4] * 4, bits, RGB, before=png_chunk(b"tRNS", struct.pack(">3H", *key)))
    left, right = halves(data)
    assert left == WHITE
    assert np.abs(np.subtract(right, ORANGE)).max() <= 1


def test_a_transparent_wide_colour_is_upright_and_keeps_its_profile() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    chunks = [
        png_chunk(b"iCCP", b"p\0\0" + zlib.compress(SRGB)),
        png_chunk(b"tRNS", struct.pack(">3H", 65535, 0, 0)),
        png_chunk(b"eXIf", exif.tobytes()[6:]),
    ]
    data = png([[65535, 0, 0] * 4 + [0, 0, 65535] * 4] * 2, 16, RGB, before=b"".join(chunks))
    pixels = read(data)
    assert pixels.shape == (8, 2, 3)
    assert pixels[1, 0].tolist() == [255, 255, 255]
    assert pixels[-2, 0].tolist() == pytest.approx([0, 0, 255], abs=1)


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_transparent_palette_entry_is_white(bits: int) -> None:
    palette = png_chunk(b"PLTE", bytes(ORANGE + TEAL)) + png_chunk(b"tRNS", b"\0")
    assert halves(png([[0] * 8 + [1] * 8] * 4, bits, PALETTE, before=palette)) == (WHITE, TEAL)


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize("colour", [GREY_ALPHA, RGBA])
def test_alpha_is_composited_on_white(bits: int, colour: int) -> None:
    largest = 2**bits - 1
    black = [0] * (1 if colour == GREY_ALPHA else 3)
    rows = [[*black, 0] * 4 + [*black, largest] * 4] * 4
    assert halves(png(rows, bits, colour)) == (WHITE, (0, 0, 0))


def test_gamma_is_applied_where_nothing_else_says_what_colours_are() -> None:
    """Half of the light is 188 in sRGB; a gamma like sRGB's own changes nothing."""
    linear = png_chunk(b"gAMA", struct.pack(">I", 100_000))
    rows = [[128] * 3 * 8] * 4
    assert halves(png(rows, before=linear))[0] == (188,) * 3
    for harmless in (
        linear + png_chunk(b"sRGB", b"\0"),
        png_chunk(b"gAMA", struct.pack(">I", 45_455)),
        png_chunk(b"gAMA", struct.pack(">I", 0)),
        png_chunk(b"gAMA", struct.pack(">I", 2**32 - 1)),
    ):
        assert halves(png(rows, before=harmless))[0] == (128,) * 3


def linear_profile(num_bytes: int) -> bytes:
    """An sRGB profile whose tone curves are the identity, made longer by bytes that nothing refers to."""
    profile = bytearray(SRGB)
    for index in range(struct.unpack(">I", profile[128:132])[0]):
        name, offset, _ = struct.unpack_from(">4sII", profile, 132 + 12 * index)
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            struct.pack_into(">4sII", profile, offset, b"curv", 0, 0)
    padded = bytes(profile) + np.random.default_rng(0).bytes(num_bytes - len(profile))
    return struct.pack(">I", len(padded)) + padded[4:]


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "TIFF", "WEBP"])
@pytest.mark.parametrize("num_bytes", [2**17, 3 * 2**20])
def test_profiles_of_any_size_are_applied(kind: str, num_bytes: int) -> None:
    buffer = io.BytesIO()
    options = {"lossless": True} if kind == "WEBP" else {}
    profile = linear_profile(num_bytes)
    Image.new("RGB", (16, 16), (128, 128, 128)).save(buffer, kind, icc_profile=profile, **options)
    assert halves(buffer.getvalue())[0] == pytest.approx((188,) * 3, abs=2)


@pytest.mark.parametrize(
    "segment",
    [
        (0xE0, b"JFIF"),
        (0xE0, b"JFIF\0\1"),
        (0xE1, b"Exif\0\0"),
        (0xE1, b"Exif\0\0II*\0\xff\xff\xff\xff"),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0\xff\xfe"),
        (0xE2, b"ICC_PROFILE\0"),
        (0xE2, b"ICC_PROFILE\0\1"),
        (0xE2, b"ICC_PROFILE\0\1\2half a profile"),
        (0xE2, b"MPF\0\xff"),
        (0xED, b"Photoshop 3.0\x008BIM\x03\xed"),
        (0xED, b"Photoshop 3.0\x008BIM\x03\xed\0\0\0\0\0\1x"),
        (0xEE, b"Adobe"),
        (0xEE, b"Adobe\0d\0\0\0\0"),
        (0xFE, b""),
    ],
    ids=lambda segment: f"{segment[0]:X}-{segment[1][-6:]!r}",
)
def test_damaged_segments_cost_no_jpeg(segment: tuple[int, bytes]) -> None:
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), ORANGE).save(buffer, "JPEG", quality=95)
    assert read(jpeg_with(buffer.getvalue(), segment)).tolist() == read(buffer.getvalue()).tolist()


@pytest.mark.parametrize(
    ("start", "kind"),
    [(b"II*\0", "TIFF"), (b"MM\0*", "TIFF"), (b"II+\0", "TIFF"), (b"MM\0+", "TIFF"), (b"II\0*", None)],
)
def test_tiff_is_told_by_its_first_bytes(start: bytes, kind: str | None) -> None:
    assert sniff(start + bytes(20)) == kind


def test_other_files_are_named() -> None:
    with pytest.raises(OSError, match="readable format"):
        open_picture(b"GIF?")
