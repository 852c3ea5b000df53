"""Image files and tensors to the tensors that the model takes, and pictures back to image files.

Every picture is brought to RGB [3, S, S] in [0, 1], S the model's image size: EXIF orientation
applied, colours converted to sRGB by the embedded ICC profile where there is one, alpha composited
on white, then fitted. Of animations the first frame is taken. What a file may cost is judged from
its header, before any pixel is decoded.
"""

import io
import logging
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageCms, ImageFile
from PIL.BmpImagePlugin import BmpImageFile
from PIL.GifImagePlugin import GifImageFile
from PIL.JpegImagePlugin import JpegImageFile
from PIL.PngImagePlugin import PngImageFile
from PIL.TiffImagePlugin import TiffImageFile
from PIL.WebPImagePlugin import WebPImageFile
from torch import Tensor

from service.errors import ImageError, MalformedError, TooLargeError

logger = logging.getLogger(__name__)

Fit = Literal["crop", "pad", "stretch"]
PictureFormat = Literal["png", "jpeg", "webp"]

_OPENERS: dict[str, Callable[[io.BytesIO], ImageFile.ImageFile]] = {
    "JPEG": JpegImageFile,
    "PNG": PngImageFile,
    "WebP": WebPImageFile,
    "GIF": GifImageFile,
    "BMP": BmpImageFile,
    "TIFF": TiffImageFile,
}
READABLE_FORMATS = ", ".join(_OPENERS)

# What Pillow's decoders are known to raise on damaged files.
_DECODER_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    ArithmeticError,
    LookupError,
    TypeError,
    AttributeError,
    NotImplementedError,
    struct.error,
    zlib.error,
)
_PNG_END = b"IEND\xaeB`\x82"
_ORIENTATION_TAG = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings an EXIF orientation upright."""
_WIDE_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
_PLAIN_MODES = frozenset({"1", "L", "P", "RGB", "CMYK", "YCbCr"})
_ALPHA_MODES = frozenset({"LA", "PA", "RGBA", "RGBa"})
_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_WHITE = (255, 255, 255)
_WRITE_OPTIONS: dict[PictureFormat, dict[str, int]] = {
    "png": {"compress_level": 6},
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 95},
}


@dataclass(frozen=True)
class ImageRules:
    """What is accepted and how it is fitted: side in pixels, most pixels, largest side ratio, fit."""

    side: int
    max_pixels: int
    max_aspect_ratio: float
    fit: Fit = "crop"


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
    if data.startswith((b"II*\0", b"MM\0*")):
        return "TIFF"
    return None


def read_image(data: bytes, rules: ImageRules, name: str = "the image") -> Tensor:
    """Bytes of an image file to RGB [3, S, S] float32 in [0, 1].

    Args:
        data: a JPEG, PNG, WebP, GIF, BMP or TIFF file.
        rules: limits, size and fit.
        name: how errors call the image, such as ``image 3``.

    Raises:
        MalformedError: not an image of a readable format, or a damaged one.
        TooLargeError: more pixels than allowed.
        ImageError: too elongated, or of a pixel type that has no defined colours.
    """
    kind = sniff(data)
    if not data:
        raise MalformedError(f"{_capital(name)} is empty.")
    if kind is None:
        raise MalformedError(f"{_capital(name)} is not an image in a readable format ({READABLE_FORMATS}).")
    if kind == "PNG" and len(data) >= 24:  # so that a header alone is judged, whatever follows it
        width, height = struct.unpack(">II", data[16:24])
        _check_size(width, height, rules, name)
    try:
        with _OPENERS[kind](io.BytesIO(data)) as picture:
            _check_size(*picture.size, rules, name)
            picture.load()
            if kind == "PNG" and _PNG_END not in data:  # Pillow is content with the pixels
                raise OSError("its end is missing")
            rgb = _to_rgb(_upright(picture), name)
    except Image.DecompressionBombError as exc:  # WebP and tiled TIFF: Pillow looks before we can
        raise TooLargeError(
            f"{_capital(name)} declares more pixels than can be decoded: {_reason(exc)}."
        ) from exc
    except _DECODER_ERRORS as exc:
        raise MalformedError(
            f"{_capital(name)} is a damaged or truncated {kind} file: {_reason(exc)}."
        ) from exc
    return to_tensor(_fit_picture(rgb, rules))


def read_pixels(pixels: Tensor, rules: ImageRules, name: str = "the image") -> Tensor:
    """An image tensor [3, H, W] in [0, 1] to [3, S, S], fitted like a file.

    Raises:
        TooLargeError: more pixels than allowed.
        ImageError: too elongated.
    """
    height, width = pixels.shape[1:]
    _check_size(width, height, rules, name)
    if (height, width) == (rules.side, rules.side):
        return pixels
    new_width, new_height = _fitted_size(width, height, rules)
    resized = F.interpolate(
        pixels[None], size=(new_height, new_width), mode="bicubic", align_corners=False, antialias=True
    )[0].clamp(0, 1)
    top, left = round((new_height - rules.side) / 2), round((new_width - rules.side) / 2)
    if rules.fit == "pad":
        right, bottom = rules.side - new_width + left, rules.side - new_height + top
        return F.pad(resized, (-left, right, -top, bottom), value=1.0)
    return resized[:, top : top + rules.side, left : left + rules.side].contiguous()


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture to [3, H, W] float32 in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float().div(255).contiguous()


def to_bytes(pixels: Tensor) -> Tensor:
    """[..., 3, H, W] in [0, 1] to uint8, rounded."""
    return pixels.mul(255).round().clamp(0, 255).to(torch.uint8)


def write_picture(pixels: Tensor, picture_format: PictureFormat) -> bytes:
    """[3, H, W] in [0, 1] to the bytes of an image file."""
    picture = Image.fromarray(to_bytes(pixels).permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    picture.save(buffer, picture_format, **_WRITE_OPTIONS[picture_format])
    return buffer.getvalue()


def _check_size(width: int, height: int, rules: ImageRules, name: str) -> None:
    if width < 1 or height < 1:
        raise MalformedError(f"{_capital(name)} declares a size of {width}x{height} pixels.")
    if width * height > rules.max_pixels:
        raise TooLargeError(
            f"{_capital(name)} declares {width}x{height} = {width * height} pixels; "
            f"at most {rules.max_pixels} are accepted."
        )
    ratio = max(width, height) / min(width, height)
    if ratio > rules.max_aspect_ratio:
        raise ImageError(
            f"{_capital(name)} is {width}x{height} pixels, sides in a ratio of {ratio:.0f}; "
            f"at most {rules.max_aspect_ratio:g} is accepted."
        )


def _upright(picture: ImageFile.ImageFile) -> Image.Image:
    """The first frame with EXIF orientation applied; unreadable EXIF counts as none."""
    try:
        orientation = picture.getexif().get(_ORIENTATION_TAG, 1)
    except _DECODER_ERRORS:
        logger.debug("ignored unreadable EXIF data", exc_info=True)
        return picture
    transpose = _UPRIGHT.get(orientation)
    return picture if transpose is None else picture.transpose(transpose)


def _to_rgb(picture: Image.Image, name: str) -> Image.Image:
    """Any picture to sRGB on white."""
    profile = picture.info.get("icc_profile")
    transparency = picture.info.get("transparency")
    if picture.mode in _WIDE_MODES:
        picture, transparency = _narrow(picture, transparency)
    if picture.mode in _ALPHA_MODES or transparency is not None:
        colour_mode = "L" if picture.mode in ("L", "LA") else "RGB"  # a grey profile wants grey pixels
        picture = picture.convert("RGBA")
        colours = _apply_profile(picture.convert(colour_mode), profile)
        on_white = Image.new("RGB", picture.size, _WHITE)
        on_white.paste(colours, mask=picture.getchannel("A"))
        return on_white
    if picture.mode not in _PLAIN_MODES:
        raise ImageError(
            f"{_capital(name)} has pixels of type {picture.mode!r}, whose colours are not defined."
        )
    if picture.mode in ("1", "P", "YCbCr"):
        picture = picture.convert("RGB")
    return _apply_profile(picture, profile)


def _narrow(picture: Image.Image, transparency: object) -> tuple[Image.Image, None]:
    """16-bit grey to 8 bits, scaled (Pillow's own conversion clips); the transparent grey becomes white."""
    values = np.asarray(picture).astype(np.float32)
    grey = np.clip(values / 257.0, 0, 255).round().astype(np.uint8)
    if isinstance(transparency, int):
        grey[values == transparency] = 255
    return Image.fromarray(grey), None


def _apply_profile(picture: Image.Image, profile: object) -> Image.Image:
    """Colours to sRGB by the embedded profile; a profile that is broken or of another kind is ignored."""
    if isinstance(profile, bytes) and profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(picture, source, _SRGB, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            logger.debug("ignored an unusable ICC profile", exc_info=True)
        else:
            assert converted is not None
            return converted
    return picture.convert("RGB")


def _fitted_size(width: int, height: int, rules: ImageRules) -> tuple[int, int]:
    """Width and height after the resize and before the crop or the padding."""
    if rules.fit == "stretch":
        return rules.side, rules.side
    scale = rules.side / (min if rules.fit == "crop" else max)(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))


def _fit_picture(picture: Image.Image, rules: ImageRules) -> Image.Image:
    """An RGB picture to [S, S]: antialiased bicubic resize, then a centred crop or padding with white."""
    size = _fitted_size(*picture.size, rules)
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - rules.side) / 2), round((size[1] - rules.side) / 2)
    if rules.fit == "pad":
        padded = Image.new("RGB", (rules.side, rules.side), _WHITE)
        padded.paste(picture, (-left, -top))
        return padded
    if size == (rules.side, rules.side):
        return picture
    return picture.crop((left, top, left + rules.side, top + rules.side))


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text[:200] or type(error).__name__
