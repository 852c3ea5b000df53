"""What image files may cost, told from their headers."""

import io
import struct
import zlib

import pytest
from PIL import Image

from model.errors import PictureCostError
from model.images.costs import Extent, check_parts, measure_picture


def file_of(size: tuple[int, int], kind: str, mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size).save(buffer, kind, **options)
    return buffer.getvalue()


def tiff(order: str, big: bool, entries: list[tuple[int, int, int]], following: int = 0) -> bytes:
    """A file of one directory; entries are tag, type and value."""
    magic = {"<": b"II", ">": b"MM"}[order]
    codes = {1: "B", 3: "H", 4: "I", 16: "Q"}
    width = 8 if big else 4
    head = (
        magic + struct.pack(order + "HHHQ", 43, 8, 0, 16) if big else magic + struct.pack(order + "HI", 42, 8)
    )
    body = struct.pack(order + ("Q" if big else "H"), len(entries))
    for tag, kind, value in entries:
        body += struct.pack(order + ("HHQ" if big else "HHI"), tag, kind, 1)
        body += struct.pack(order + codes[kind], value).ljust(width, b"\0")
    return head + body + struct.pack(order + ("Q" if big else "I"), following)


def gif(num_frames: int, between: bytes = b"") -> bytes:
    frame = b"\x2c" + struct.pack("<HHHHB", 0, 0, 1, 1, 0) + b"\x02\x02\x44\x01\x00"
    return (
        b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + bytes(6) + (between + frame) * num_frames + b";"
    )


def jpeg(num_scans: int) -> bytes:
    data = file_of((16, 16), "JPEG", quality=50)
    start = data.index(b"\xff\xda")
    return data[:start] + data[start:-2] * num_scans + b"\xff\xd9"


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "exif": b"Exif\0\0" + bytes(3000), "icc_profile": bytes(200_000)}),
        ("PNG", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"Exif\0\0"}),
        ("GIF", {}),
        ("BMP", {}),
        ("TIFF", {}),
        ("TIFF", {"big_tiff": True}),
        ("TIFF", {"compression": "tiff_deflate"}),
    ],
)
def test_size_by_the_header(kind: str, options: dict[str, object]) -> None:
    data = file_of((301, 203), kind, **options)
    assert measure_picture(data) == Extent(301, 203, 301 * 203)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_no_beginning_of_a_file_is_more_than_unknown(kind: str) -> None:
    data = file_of((30, 20), kind)
    for length in range(min(len(data), 1500)):
        assert measure_picture(data[:length]) in (None, Extent(30, 20, 600))
        check_parts(data[:length])


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("big", [False, True])
def test_tiles_count_whole(order: str, big: bool) -> None:
    entries = [(256, 3, 8), (257, 4, 8), (322, 4, 40_000), (323, 3, 30_000)]
    assert measure_picture(tiff(order, big, entries)) == Extent(8, 8, 40_000 * 30_000)
    small = [(256, 3, 100), (257, 3, 50), (322, 3, 64), (323, 3, 64)]
    assert measure_picture(tiff(order, big, small)) == Extent(100, 50, 128 * 64)


def test_the_largest_of_several_tiles_counts() -> None:
    entries = [(256, 3, 8), (257, 3, 8), (322, 3, 16), (322, 3, 60_000), (323, 3, 60_000)]
    extent = measure_picture(tiff("<", False, entries))
    assert extent is not None
    assert extent.coded_pixels == 60_000**2


@pytest.mark.parametrize("between", [b"", b"\x21\xfe\x03abc\x00", b"\x21\xf9\x04" + bytes(4) + b"\x00"])
def test_frames_of_gif(between: bytes) -> None:
    check_parts(gif(5, between), max_frames=5)
    with pytest.raises(PictureCostError, match="more than 5 frames"):
        check_parts(gif(6, between), max_frames=5)
    with pytest.raises(PictureCostError, match="more than 5 frames"):
        check_parts(gif(200_000, between), max_frames=5)


def test_pages_of_tiff() -> None:
    buffer = io.BytesIO()
    pages = [Image.new("L", (8, 8)) for _ in range(4)]
    pages[0].save(buffer, "TIFF", save_all=True, append_images=pages[1:])
    check_parts(buffer.getvalue(), max_frames=4)
    with pytest.raises(PictureCostError, match="more than 3 frames"):
        check_parts(buffer.getvalue(), max_frames=3)
    check_parts(tiff("<", False, [(256, 3, 8)], following=8), max_frames=1)  # in a circle


def test_scans_of_jpeg() -> None:
    progressive = file_of((64, 64), "JPEG", progressive=True)
    check_parts(progressive)
    check_parts(jpeg(100))
    for num_scans in (101, 5000):
        with pytest.raises(PictureCostError, match="more than 100 scans"):
            check_parts(jpeg(num_scans))


def test_a_scan_in_a_thumbnail_or_behind_the_end_is_none() -> None:
    thumbnail = b"Exif\0\0" + b"\xff\xda" * 500
    data = file_of((64, 64), "JPEG", exif=thumbnail)
    check_parts(data + b"\xff\xda" * 500)


def test_segments_of_jpeg_are_bounded() -> None:
    many = b"\xff\xd8" + b"\xff\xe1\x00\x02" * 10_000
    with pytest.raises(PictureCostError, match="segments"):
        measure_picture(many)
    assert measure_picture(b"\xff\xd8\xff" + b"\0\xff" * 10**6) is None


def test_the_screen_of_a_gif_grows_with_its_first_frame() -> None:
    frame = b"\x21\xfe\x03abc\x00\x2c" + struct.pack("<HHHHB", 10, 0, 5000, 4, 0) + b"\x02\x02\x44\x01\x00"
    screen = b"GIF89a" + struct.pack("<HHBBB", 8, 8, 0x80, 0, 0) + bytes(6)
    assert measure_picture(screen + frame + b";") == Extent(5010, 8, 5010 * 8)
    assert measure_picture(screen + frame[:12]) is None


def test_what_is_no_picture_has_no_size() -> None:
    for data in (b"", b"x", b"RIFF", b"RIFF....WEBPVP9 ", zlib.compress(b"x" * 100)):
        assert measure_picture(data) is None
