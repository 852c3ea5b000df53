"""Pictures that are decoded and fitted faster, against the exact ones: real photos, of every kind of file."""

import io
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms

from model.images import quick
from model.images.files import Fit, fit_picture, fitted_size
from model.images.opening import open_picture
from model.images.quick import REDUCING_GAP, fit_quickly
from model.images.tensors import to_byte_tensor
from model.tokenizer import Tokenizer

SAMPLES = sorted((Path(__file__).parents[3] / "samples").glob("*.jpg"))
SIDE = 64
CLOSE_DB = 40
"""A shift by a tenth of a pixel, or another filter, is farther away."""


@cache
def mosaic(num: int, width: int, height: int) -> Image.Image:
    """Many real photos side by side, num x num, as one large photo that is as sharp as they are."""
    photos = [Image.open(path).convert("RGB") for path in SAMPLES]
    least = tuple(min(sides) for sides in zip(*(photo.size for photo in photos), strict=True))
    picture = Image.new("RGB", (num * least[0], num * least[1]))
    for index in range(num * num):
        row, column = divmod(index, num)
        picture.paste(photos[index % len(photos)].crop((0, 0, *least)), (column * least[0], row * least[1]))
    return picture.crop((0, 0, width, height))


def jpeg(picture: Image.Image, **options: object) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=92, **options)
    return buffer.getvalue()


def exactly(data: bytes, side: int = SIDE, fit: Fit = "crop") -> Image.Image:
    return fit_picture(open_picture(data).read(), side, fit)


def quickly(data: bytes, side: int = SIDE, fit: Fit = "crop") -> Image.Image:
    opened = open_picture(data)
    width, height = fitted_size(*opened.size, side, fit)
    return fit_quickly(*opened.read_reduced(REDUCING_GAP * width, REDUCING_GAP * height), side, fit)


def decibels(one: Image.Image, other: Image.Image) -> float:
    assert one.size == other.size
    difference = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    return float(10 * np.log10(255**2 / max(1e-9, np.square(difference).mean())))


@pytest.mark.parametrize("fit", ["crop", "pad", "stretch"])
@pytest.mark.parametrize(
    "size", [(766, 501), (301, 440), (517, 517), (150, 75), (90, 64), (64, 64), (30, 41)]
)
def test_every_size_and_fit_is_close(size: tuple[int, int], fit: Fit) -> None:
    data = jpeg(mosaic(1, *size))
    assert decibels(exactly(data, fit=fit), quickly(data, fit=fit)) > CLOSE_DB


@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_partial_row_and_column_stay_where_they_belong(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = jpeg(mosaic(1, 763, 505), exif=exif)
    reduced, box = open_picture(data).read_reduced(2 * SIDE, 2 * SIDE)
    assert sorted(reduced.size) == [253, 382]
    assert sorted((box[2] - box[0], box[3] - box[1])) == [252.5, 381.5]
    assert decibels(exactly(data), quickly(data)) > CLOSE_DB


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGB"])
@pytest.mark.parametrize("progressive", [False, True])
def test_kinds_of_jpeg_files(mode: str, progressive: bool) -> None:
    data = jpeg(mosaic(1, 760, 500).convert(mode), progressive=progressive)
    assert decibels(exactly(data), quickly(data)) > CLOSE_DB


def test_profiles_are_applied() -> None:
    plain = mosaic(1, 760, 500)
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
    data = jpeg(plain, icc_profile=profile.tobytes())
    assert decibels(exactly(data), quickly(data)) > CLOSE_DB


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "BMP", "TIFF", "GIF"])
def test_other_files_are_reduced_after_they_are_decoded(kind: str) -> None:
    buffer = io.BytesIO()
    mosaic(1, 761, 503).save(buffer, kind)
    opened = open_picture(buffer.getvalue())
    assert opened.read_reduced(2 * SIDE, 2 * SIDE)[0].size == (761, 503)
    assert decibels(exactly(buffer.getvalue()), quickly(buffer.getvalue())) > CLOSE_DB


@pytest.mark.parametrize(
    ("side", "size"),
    [(31, (96, 63)), (32, (192, 126)), (64, (384, 252)), (126, (384, 252)), (127, (768, 504))],
)
def test_a_file_is_decoded_at_twice_the_size_that_is_wanted_at_least(
    side: int, size: tuple[int, int]
) -> None:
    opened = open_picture(jpeg(mosaic(1, 768, 504)))
    width, height = fitted_size(*opened.size, side, "crop")
    assert opened.read_reduced(2 * width, 2 * height)[0].size == size


def test_pillow_resizes_where_there_is_nothing_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick, "HAS_VECTORS", False)
    data = jpeg(mosaic(1, 763, 505))
    assert decibels(exactly(data), quickly(data)) > CLOSE_DB


def test_latents_differ_by_less_than_jpeg_quality_95_does() -> None:
    """Photos of 3 and 12 megapixels, which are decoded at a half and a quarter of their size."""
    tokenizer = Tokenizer.load("mini")
    side = tokenizer.config.image_size
    for num, size in ((3, (2047, 1365)), (6, (4000, 3000))):
        data = jpeg(mosaic(num, *size))
        exact = exactly(data, side)
        buffer = io.BytesIO()
        exact.save(buffer, "JPEG", quality=95)
        pictures = [exact, quickly(data, side), Image.open(buffer)]
        latents = tokenizer.encode(torch.stack([to_byte_tensor(picture) for picture in pictures]))
        of_quick, of_jpeg = ((other - latents[0]).norm() for other in latents[1:])
        assert of_quick < of_jpeg
