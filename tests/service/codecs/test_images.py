"""Image files and tensors to model inputs: correct pixels for every kind of file."""

import contextlib
import io
import struct
import time
import zlib
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from model.images.opening import sniff
from model.images.tensors import to_bytes
from service.codecs.images import read_image, read_pixels, write_picture
from service.errors import ImageError, MalformedError, TooLargeError
from service.photos.decode import ImageRules

SIDE = 64


def unit_image(*arguments: Any) -> torch.Tensor:
    """What `read_image` gives, in [0, 1]."""
    pixels = read_image(*arguments)
    assert pixels.dtype == torch.uint8
    return pixels.float() / 255


RULES = ImageRules(side=SIDE, max_pixels=1_000_000, max_aspect_ratio=20)
EXACT = 0.5 / 255


def picture_of(colours: list[list[tuple[int, int, int]]]) -> Image.Image:
    """A 64x64 picture of equal blocks."""
    blocks = np.array(colours, dtype=np.uint8)
    scale = SIDE // len(colours)
    return Image.fromarray(blocks.repeat(scale, axis=0).repeat(scale, axis=1))


RED, GREEN, BLUE, GREY = (255, 0, 0), (0, 255, 0), (0, 0, 255), (128, 128, 128)
QUADRANTS = picture_of([[RED, GREEN], [BLUE, GREY]])


def file_of(picture: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def expect(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1) / 255


def assert_pixels(data: bytes, expected: torch.Tensor, atol: float = EXACT) -> None:
    pixels = unit_image(data, RULES)
    assert pixels.shape == (3, SIDE, SIDE)
    assert pixels.dtype == torch.float32
    torch.testing.assert_close(pixels, expected, atol=atol, rtol=0)


def png_header(width: int, height: int, rest: bytes = b"") -> bytes:
    fields = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = b"IHDR" + fields
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + rest


@pytest.mark.parametrize(
    ("kind", "options", "name"),
    [
        ("PNG", {}, "PNG"),
        ("BMP", {}, "BMP"),
        ("TIFF", {}, "TIFF"),
        ("WEBP", {"lossless": True}, "WebP"),
        ("GIF", {}, "GIF"),
    ],
)
def test_lossless_formats_keep_every_pixel(kind: str, options: dict[str, object], name: str) -> None:
    data = file_of(QUADRANTS, kind, **options)
    assert sniff(data) == name
    assert_pixels(data, expect(QUADRANTS))


def test_jpeg_is_close() -> None:
    assert_pixels(file_of(QUADRANTS, "JPEG", quality=100, subsampling=0), expect(QUADRANTS), atol=4 / 255)


def test_grey_is_replicated() -> None:
    grey = QUADRANTS.convert("L")
    assert_pixels(file_of(grey, "PNG"), expect(grey))
    assert_pixels(file_of(grey, "JPEG", quality=100), expect(grey), atol=3 / 255)


def test_bilevel() -> None:
    bilevel = QUADRANTS.convert("L").point(lambda value: 255 * (value > 100)).convert("1")
    assert_pixels(file_of(bilevel, "PNG"), expect(bilevel))


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    ramp = np.linspace(0, 65535, SIDE * SIDE).reshape(SIDE, SIDE).astype(np.uint16)
    data = file_of(Image.fromarray(ramp), kind)
    expected = torch.from_numpy(ramp.astype(np.float32) / 65535).expand(3, SIDE, SIDE)
    assert_pixels(data, expected, atol=0.51 / 255)


def test_16_bit_grey_with_a_transparent_value() -> None:
    values = np.full((SIDE, SIDE), 40000, dtype=np.uint16)
    values[:, : SIDE // 2] = 1234
    pixels = unit_image(file_of(Image.fromarray(values), "PNG", transparency=1234), RULES)
    assert torch.equal(pixels[:, :, : SIDE // 2], torch.ones(3, SIDE, SIDE // 2))
    torch.testing.assert_close(pixels[:, 0, -1], torch.full((3,), 40000 / 65535), atol=EXACT, rtol=0)


def test_16_bit_colour() -> None:
    values = np.random.default_rng(2).integers(0, 65536, (SIDE, SIDE, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    header = struct.pack(">IIBBBBB", SIDE, SIDE, 16, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))
        for name, content in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b""))
    )
    expected = torch.from_numpy(values.astype(np.float32) / 65535).permute(2, 0, 1)
    assert_pixels(data, expected, atol=1.01 / 255)


def test_palette() -> None:
    palette = QUADRANTS.quantize(4)
    assert palette.mode == "P"
    assert_pixels(file_of(palette, "PNG"), expect(palette))


def test_palette_transparency_becomes_white() -> None:
    palette = QUADRANTS.quantize(4)
    red = palette.getpixel((0, 0))
    expected = expect(palette)
    expected[:, : SIDE // 2, : SIDE // 2] = 1.0
    assert_pixels(file_of(palette, "PNG", transparency=red), expected)
    assert_pixels(file_of(palette, "GIF", transparency=red), expected)


@pytest.mark.parametrize("alpha", [0, 64, 255])
def test_alpha_is_composited_on_white(alpha: int) -> None:
    rgba = QUADRANTS.copy()
    rgba.putalpha(alpha)
    expected = expect(QUADRANTS) * alpha / 255 + (1 - alpha / 255)
    assert_pixels(file_of(rgba, "PNG"), expected, atol=1.01 / 255)
    assert_pixels(file_of(rgba, "WEBP", lossless=True, exact=True), expected, atol=1.01 / 255)


def test_grey_with_alpha_is_composited_on_white() -> None:
    la = QUADRANTS.convert("L")
    la.putalpha(128)
    expected = expect(QUADRANTS.convert("L")) * 128 / 255 + (1 - 128 / 255)
    assert_pixels(file_of(la, "PNG"), expected, atol=1.01 / 255)


@pytest.mark.parametrize("kind", ["TIFF", "JPEG"])
def test_cmyk(kind: str) -> None:
    cmyk = QUADRANTS.convert("CMYK")
    options = {"quality": 100} if kind == "JPEG" else {}
    assert_pixels(file_of(cmyk, kind, **options), expect(QUADRANTS), atol=6 / 255)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "TIFF"])
def test_exif_orientation(orientation: int, kind: str) -> None:
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = QUADRANTS if undo is None else QUADRANTS.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"PNG": {}, "JPEG": {"quality": 100, "subsampling": 0}, "WEBP": {"lossless": True}, "TIFF": {}}[
        kind
    ]
    assert_pixels(file_of(stored, kind, exif=exif, **options), expect(QUADRANTS), atol=4 / 255)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_unreadable_exif_counts_as_none() -> None:
    assert_pixels(file_of(QUADRANTS, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff"), expect(QUADRANTS))


@pytest.mark.parametrize("kind", ["GIF", "WEBP"])
def test_animations_give_their_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (SIDE, SIDE), colour) for colour in (GREEN, BLUE)]
    options = {"lossless": True} if kind == "WEBP" else {}
    data = file_of(QUADRANTS, kind, save_all=True, append_images=frames, duration=100, **options)
    assert Image.open(io.BytesIO(data)).n_frames == 3
    assert_pixels(data, expect(QUADRANTS))


def test_icc_profile_is_applied() -> None:
    """In a linear-light space, half of the light is the value 188 of sRGB."""
    linear = linear_light_profile()
    grey = Image.new("RGB", (SIDE, SIDE), GREY)
    pixels = unit_image(file_of(grey, "PNG", icc_profile=linear), RULES)
    torch.testing.assert_close(pixels, torch.full_like(pixels, 188 / 255), atol=2 / 255, rtol=0)


def test_srgb_profile_changes_next_to_nothing() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert_pixels(file_of(QUADRANTS, "PNG", icc_profile=profile), expect(QUADRANTS), atol=1.01 / 255)


def test_unusable_icc_profiles_are_ignored() -> None:
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    for profile in (b"nonsense", lab):
        assert_pixels(file_of(QUADRANTS, "PNG", icc_profile=profile), expect(QUADRANTS))


def linear_light_profile() -> bytes:
    """The sRGB profile with its tone curves replaced by the identity."""
    profile = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    num_tags = struct.unpack(">I", profile[128:132])[0]
    for index in range(num_tags):
        name, offset, size = struct.unpack(">4sII", profile[132 + 12 * index : 144 + 12 * index])
        if name in (b"rTRC", b"gTRC", b"bTRC"):
            curve = b"curv" + bytes(8)  # no points: the identity
            profile[offset : offset + len(curve)] = curve
            assert size >= len(curve)
    return bytes(profile)


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (64, 64), (200, 64), (64, 200), (333, 77)])
@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
def test_every_size_and_fit_gives_the_model_size(size: tuple[int, int], fit: str) -> None:
    rules = ImageRules(SIDE, 1_000_000, 20, fit)  # type: ignore[arg-type]
    picture = Image.new("RGB", size, (10, 200, 30))
    from_file = unit_image(file_of(picture, "PNG"), rules)
    from_tensor = read_pixels(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255, rules)
    assert from_file.shape == from_tensor.shape == (3, SIDE, SIDE)
    torch.testing.assert_close(from_file, from_tensor, atol=1.01 / 255, rtol=0)
    torch.testing.assert_close(
        from_file[:, SIDE // 2, SIDE // 2], torch.tensor([10, 200, 30]) / 255, atol=EXACT, rtol=0
    )


def test_crop_takes_the_centre_and_pad_adds_white() -> None:
    wide = Image.new("RGB", (3 * SIDE, SIDE), BLUE)
    wide.paste(RED, (SIDE, 0, 2 * SIDE, SIDE))
    assert_pixels(file_of(wide, "PNG"), expect(Image.new("RGB", (SIDE, SIDE), RED)))
    padded = unit_image(file_of(wide, "PNG"), ImageRules(SIDE, 1_000_000, 20, "pad"))
    assert torch.equal(padded[:, 0], torch.ones(3, SIDE))
    assert torch.equal(padded[:, -1], torch.ones(3, SIDE))
    assert torch.equal(padded[:, SIDE // 2, 0], torch.tensor([0.0, 0.0, 1.0]))


def test_resize_is_antialiased() -> None:
    checkers = np.indices((8 * SIDE, 8 * SIDE)).sum(axis=0) % 2 * 255
    picture = Image.fromarray(checkers.astype(np.uint8)).convert("RGB")
    for pixels in (
        unit_image(file_of(picture, "PNG"), RULES),
        read_pixels(torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255, RULES),
    ):
        torch.testing.assert_close(pixels, torch.full_like(pixels, 0.5), atol=0.02, rtol=0)


def test_huge_declared_sizes_are_refused_from_the_header() -> None:
    started_s = time.monotonic()
    complete = png_header(30_000, 30_000, file_of(QUADRANTS, "PNG")[33:])
    for data in (png_header(30_000, 30_000), complete):
        with pytest.raises(TooLargeError, match="30000x30000 = 900000000 pixels"):
            unit_image(data, RULES)
    assert time.monotonic() - started_s < 1


@pytest.mark.parametrize("kind", ["JPEG", "BMP", "GIF", "TIFF", "WEBP"])
def test_pixel_limit_holds_for_every_format(kind: str) -> None:
    data = file_of(Image.new("RGB", (300, 200)), kind)
    with pytest.raises(TooLargeError, match="60000 pixels"):
        unit_image(data, ImageRules(SIDE, 59_999, 20))


def test_elongated_images_are_refused() -> None:
    for size in ((1, 5000), (5000, 1)):
        with pytest.raises(ImageError, match="ratio of 5000"):
            unit_image(file_of(Image.new("RGB", size), "PNG"), RULES)
    with pytest.raises(ImageError, match="ratio of 5000"):
        read_pixels(torch.zeros(3, 1, 5000), RULES)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "GIF", "WEBP", "BMP", "TIFF"])
@pytest.mark.parametrize("kept", [0.05, 0.5, 0.9])
def test_truncated_files_are_named(kind: str, kept: float) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (SIDE, SIDE, 3), dtype=np.uint8)
    data = file_of(Image.fromarray(noise), kind)
    with pytest.raises(MalformedError, match=r"^Image 3 is a damaged or truncated"):
        unit_image(data[: max(20, int(len(data) * kept))], RULES, "image 3")


@pytest.mark.filterwarnings("ignore")  # Pillow's own about damaged metadata
def test_damaged_bytes_never_raise_anything_else() -> None:
    rng = np.random.default_rng(1)
    small = QUADRANTS.resize((16, 16))
    for kind in ("PNG", "JPEG", "GIF", "WEBP", "BMP", "TIFF"):
        data = np.frombuffer(file_of(small, kind), dtype=np.uint8)
        for _ in range(40):
            damaged = data.copy()
            places = rng.integers(2, len(data), 4)
            damaged[places] = rng.integers(0, 255, 4)
            with contextlib.suppress(MalformedError, ImageError, TooLargeError):
                assert unit_image(damaged.tobytes(), RULES).shape == (3, SIDE, SIDE)


def test_floating_point_tiff_has_no_defined_colours() -> None:
    data = file_of(Image.fromarray(np.zeros((8, 8), dtype=np.float32)), "TIFF")
    with pytest.raises(ImageError, match="colours are not defined"):
        unit_image(data, RULES)


@pytest.mark.parametrize("data", [b"hello, I am text", b"<svg/>", b"\x00" * 64])
def test_text_is_no_image(data: bytes) -> None:
    with pytest.raises(MalformedError, match="not an image in a readable format"):
        unit_image(data, RULES)


def test_pictures_are_written_rounded() -> None:
    ramp = torch.linspace(0, 1, SIDE)
    pixels = torch.stack(
        [ramp.expand(SIDE, SIDE), ramp[:, None].expand(SIDE, SIDE), torch.full((SIDE, SIDE), 0.3)]
    )
    for kind in ("png", "jpeg", "webp"):
        data = write_picture(pixels, kind)  # type: ignore[arg-type]
        assert sniff(data).lower() == kind
        atol = 1.01 * EXACT if kind == "png" else 8 / 255
        torch.testing.assert_close(unit_image(data, RULES), pixels, atol=atol, rtol=0)
    assert to_bytes(torch.tensor([0.0, 0.5 / 255, 1.51 / 255, 1.0])).tolist() == [0, 0, 2, 255]


def animation(num_frames: int, kind: str) -> bytes:
    frames = [Image.new("RGB", (8, 8), (60 * index, 0, 0)) for index in range(num_frames)]
    return file_of(frames[0], kind, save_all=True, append_images=frames[1:])


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_many_frames_are_refused_and_few_give_the_first(kind: str) -> None:
    rules = ImageRules(SIDE, 1_000_000, 20, max_frames=3)
    assert unit_image(animation(3, kind), rules).amax() < 0.01
    with pytest.raises(TooLargeError, match="more than 3 frames"):
        read_image(animation(4, kind), rules)
