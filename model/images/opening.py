"""Image files to RGB pictures, with Pillow alone: the one way in for service, command line and training.

A file is opened in three steps, so that callers can judge it between them: its format is told from the
first bytes, its header is read, its first frame is decoded. Metadata that is damaged or too large never
costs the photo; a layout of pixels that Pillow misreads is put right here, or refused with its name.
"""

import io
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
from PIL import Image, ImageFile, ImagePalette
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile

from model.errors import ImageError
from model.images.files import Box, narrow, to_srgb, upright, upright_box
from model.images.jpeg import strip_jpeg
from model.images.png import strip_png
from model.images.tiff import strip_tiff

Finish = Callable[[ImageFile.ImageFile], Image.Image]

_COLOR_MAP = 320
_TIFF_STARTS = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")


@dataclass(frozen=True)
class OpenPicture:
    """An image file whose header is read.

    Attributes:
        image: Pillow's; its pixels are decoded by `read`.
        finish: the step that Pillow leaves undone when it decodes.
    """

    image: ImageFile.ImageFile
    finish: Finish

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.image.close()

    @property
    def size(self) -> tuple[int, int]:
        """Width and height in pixels."""
        return self.image.size

    def read(self) -> Image.Image:
        """The first frame in upright sRGB, its transparent parts on white.

        Raises:
            ImageError: pixels that have no defined colours.
            DECODER_ERRORS: the file is damaged.
        """
        picture = self._decode()
        return picture.copy() if picture is self.image else picture

    def read_reduced(self, width: int, height: int) -> tuple[Image.Image, Box]:
        """As `read`, but a JPEG file at half, a quarter or an eighth of its size, where that is large enough.

        Its decoder then leaves out the finest frequencies instead of averaging pixels: several times as fast.

        Args:
            width: fewest pixels of a row, before the picture is turned upright.
            height: fewest rows.

        Returns:
            The picture, which may not outlive the file, and the box of it that shows the photo: an outermost
            row or column may be partial.

        Raises:
            as `read` does.
        """
        drafted = self.image.draft(None, (width, height))
        extent = drafted[1][2:] if drafted else self.image.size
        box = upright_box(self.image, *extent)
        return self._decode(), box

    def _decode(self) -> Image.Image:
        """The first frame in upright sRGB, perhaps as the file's own picture, which ends with it."""
        self.image.load()
        return to_srgb(upright(self.finish(self.image)))


def sniff(data: bytes) -> str | None:
    """Name of the image format that the first bytes announce, or None."""
    if data.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if data.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if data.startswith(b"RIFF") and data[8:12] == b"WEBP":
        return "WebP"
    if data.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if data.startswith(b"BM"):
        return "BMP"
    return "TIFF" if data.startswith(_TIFF_STARTS) else None


def open_picture(data: bytes) -> OpenPicture:
    """Read the header of an image file of a format that `sniff` knows.

    Raises:
        ImageError: a layout of pixels that is not read; names it.
        DECODER_ERRORS: the file is damaged.
        PIL.Image.DecompressionBombError: it declares more pixels than Pillow decodes.
    """
    kind = sniff(data)
    if kind is None:
        raise OSError(f"not an image in a readable format ({READABLE_FORMATS})")
    return _OPENERS[kind](data)


def _as_is(image: ImageFile.ImageFile) -> Image.Image:
    return image


def _open_jpeg(data: bytes) -> OpenPicture:
    return OpenPicture(JpegImageFile(io.BytesIO(strip_jpeg(data))), _as_is)


def _open_webp(data: bytes) -> OpenPicture:
    return OpenPicture(WebPImageFile(io.BytesIO(data)), _as_is)


def _open_gif(data: bytes) -> OpenPicture:
    return OpenPicture(GifImageFile(io.BytesIO(data)), _as_is)


def _open_bmp(data: bytes) -> OpenPicture:
    return OpenPicture(BmpImageFile(io.BytesIO(data)), _as_is)


def _open_png(data: bytes) -> OpenPicture:
    png = strip_png(data)
    image = PngImageFile(io.BytesIO(png.data))
    if png.icc_profile:
        image.info["icc_profile"] = png.icc_profile

    def make_key_transparent(image: ImageFile.ImageFile) -> Image.Image:
        """Pillow keeps the high byte of each channel and compares it with the whole key."""
        assert png.wide_key is not None
        with PngImageFile(io.BytesIO(png.data)) as low:
            low.tile = [tile._replace(args="RGB;16L") for tile in low.tile]
            low_bytes = np.asarray(low)
        key_high, key_low = np.divmod(png.wide_key, 256)
        is_opaque = (np.asarray(image) != key_high.astype(np.uint8)).any(axis=-1)
        is_opaque |= (low_bytes != key_low.astype(np.uint8)).any(axis=-1)
        image.info.pop("transparency", None)
        image.putalpha(Image.fromarray(is_opaque.astype(np.uint8) * 255))
        return image

    return OpenPicture(image, make_key_transparent if png.wide_key else _as_is)


def _open_tiff(data: bytes) -> OpenPicture:
    tiff = strip_tiff(data)
    try:
        image = TiffImageFile(io.BytesIO(tiff.data))
    except SyntaxError as exc:
        raise ImageError(f"is a TIFF file of a layout that is not read: {tiff.layout}") from exc

    if image.palette is not None and max(image.tag_v2[_COLOR_MAP]) < 256:  # as old writers have it
        image.palette = ImagePalette.raw("RGB;L", bytes(image.tag_v2[_COLOR_MAP]))

    def to_eight_bits(image: ImageFile.ImageFile) -> Image.Image:
        assert tiff.white is not None
        return narrow(image, tiff.white, tiff.is_negative)

    return OpenPicture(image, _as_is if tiff.white is None else to_eight_bits)


_OPENERS: dict[str, Callable[[bytes], OpenPicture]] = {
    "JPEG": _open_jpeg,
    "PNG": _open_png,
    "WebP": _open_webp,
    "GIF": _open_gif,
    "BMP": _open_bmp,
    "TIFF": _open_tiff,
}
READABLE_FORMATS = ", ".join(_OPENERS)
