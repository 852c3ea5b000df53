"""Pictures: the one place that decides what pixels a picture has and how it is fitted.

Service, command line and training all bring a decoded picture to the model's square through here:
EXIF orientation applied, colours converted to sRGB by the embedded ICC profile where there is one,
alpha composited on white, antialiased bicubic resize, then a crop, padding or nothing. `model.images.tensors`
makes tensors of them; PyTorch is not needed here.
"""

import functools
import io
import logging
import struct
import zlib
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
from PIL import Image, ImageCms

from model.errors import ImageError

logger = logging.getLogger(__name__)

Fit = Literal["crop", "pad", "stretch"]
Box = tuple[float, float, float, float]
"""Left, top, right and bottom edge of a part of a picture, pixels."""

# What Pillow's decoders are known to raise on damaged files.
DECODER_ERRORS = (
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
_SWAPPED = frozenset({5, 6, 7, 8})
_FROM_THE_RIGHT, _FROM_THE_BOTTOM = frozenset({2, 3, 6, 7}), frozenset({3, 4, 7, 8})
"""EXIF orientations whose sides change places, and that come upright mirrored in x, and in y."""
_WIDE_MODES = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})
_PLAIN_MODES = frozenset({"1", "L", "P", "RGB", "CMYK", "YCbCr"})
_ALPHA_MODES = frozenset({"LA", "PA", "RGBA", "RGBa"})
_SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
_WHITE = (255, 255, 255)
_GAMMA_THRESHOLD = 0.05
"""Of a stated gamma from 1/2.2, below which colours stay as they are, as in libpng."""


def upright(picture: Image.Image) -> Image.Image:
    """The first frame with EXIF orientation applied; unreadable EXIF counts as none."""
    transpose = _UPRIGHT.get(_orientation(picture))
    return picture if transpose is None else picture.transpose(transpose)


def upright_box(picture: Image.Image, width: float, height: float) -> Box:
    """Where ``width`` x ``height`` pixels from a picture's top left corner are once it is `upright`."""
    orientation = _orientation(picture)
    left, top = picture.width - width, picture.height - height  # where mirrored
    if orientation in _SWAPPED:
        left, top, width, height = top, left, height, width
    left *= orientation in _FROM_THE_RIGHT
    top *= orientation in _FROM_THE_BOTTOM
    return left, top, left + width, top + height


def _orientation(picture: Image.Image) -> Any:
    """What the EXIF data says, usually a number from 1 to 8."""
    try:
        return picture.getexif().get(_ORIENTATION_TAG, 1)
    except DECODER_ERRORS:
        logger.debug("ignored unreadable EXIF data", exc_info=True)
        return 1


def to_srgb(picture: Image.Image) -> Image.Image:
    """Any picture to 8-bit sRGB, its transparent parts on white.

    Raises:
        ImageError: pixels of a type that has no defined colours, such as 32-bit integers.
    """
    if picture.mode in _WIDE_MODES:
        picture = narrow(picture)
    if picture.mode == "La":
        picture = picture.convert("LA")
    info, transparency = picture.info, picture.info.get("transparency")
    if picture.mode in _ALPHA_MODES or transparency is not None:
        colour_mode = "L" if picture.mode in ("L", "LA") else "RGB"  # a grey profile wants grey pixels
        picture = picture.convert("RGBA")
        colours = _apply_profile(picture.convert(colour_mode), info)
        on_white = Image.new("RGB", picture.size, _WHITE)
        on_white.paste(colours, mask=picture.getchannel("A"))
        return on_white
    if picture.mode not in _PLAIN_MODES:
        raise ImageError(f"has pixels of type {picture.mode!r}, whose colours are not defined")
    if picture.mode in ("1", "P", "YCbCr"):
        picture = picture.convert("RGB")
    return _apply_profile(picture, info)


def narrow(picture: Image.Image, white: int = 65535, is_negative: bool = False) -> Image.Image:
    """Grey of up to 16 bits to 8, scaled (Pillow's own conversion clips); a transparent grey becomes white.

    Args:
        picture: of a mode of 16 bits.
        white: the value of white.
        is_negative: whether white is 0 instead, and ``white`` black.
    """
    values = np.asarray(picture)
    scaled = values * np.float32(255 / white)
    np.clip(scaled, 0, 255, out=scaled)
    grey = np.rint(scaled, out=scaled).astype(np.uint8)
    if is_negative:
        grey = 255 - grey
    transparency = picture.info.get("transparency")
    if isinstance(transparency, int):
        grey[values == transparency] = 255
    narrowed = Image.fromarray(grey)
    narrowed.info = {name: value for name, value in picture.info.items() if name != "transparency"}
    return narrowed


def _apply_profile(picture: Image.Image, info: Mapping[Any, Any]) -> Image.Image:
    """Colours to sRGB, by the embedded profile or else by the gamma that a PNG file states.

    A profile that is broken or of another kind is ignored.
    """
    profile = info.get("icc_profile")
    if isinstance(profile, bytes) and profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            converted = ImageCms.profileToProfile(picture, source, _SRGB, outputMode="RGB")
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            logger.debug("ignored an unusable ICC profile", exc_info=True)
        else:
            assert converted is not None
            return converted
    if picture.mode != "RGB":
        picture = picture.convert("RGB")
    gamma = info.get("gamma", 0.0)
    if "srgb" in info or not 0 < gamma < 10 or abs(gamma * 2.2 - 1) < _GAMMA_THRESHOLD:
        return picture
    return picture.point(_gamma_table(gamma) * 3)


@functools.lru_cache(maxsize=16)
def _gamma_table(gamma: float) -> list[int]:
    """Bytes that hold the ``gamma``-th power of light, to bytes of sRGB."""
    light = (np.arange(256) / 255) ** (1 / gamma)
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    table: list[int] = (encoded * 255).round().astype(int).tolist()
    return table


def fit_picture(picture: Image.Image, side: int, fit: Fit = "crop") -> Image.Image:
    """An RGB picture to [S, S]: antialiased bicubic resize, then a centred crop or padding with white."""
    size = fitted_size(*picture.size, side, fit)
    if picture.size != size:
        picture = picture.resize(size, Image.Resampling.BICUBIC)
    return cropped(picture, side, fit)


def cropped(picture: Image.Image, side: int, fit: Fit) -> Image.Image:
    """The centre [S, S] of a picture that was resized; padded with white where it is smaller."""
    size = picture.size
    left, top = round((size[0] - side) / 2), round((size[1] - side) / 2)
    if fit == "pad":
        padded = Image.new("RGB", (side, side), _WHITE)
        padded.paste(picture, (-left, -top))
        return padded
    if size == (side, side):
        return picture
    return picture.crop((left, top, left + side, top + side))


def fitted_size(width: float, height: float, side: int, fit: Fit) -> tuple[int, int]:
    """Width and height after the resize and before the crop or the padding."""
    if fit == "stretch":
        return side, side
    scale = side / (min if fit == "crop" else max)(width, height)
    return max(1, round(width * scale)), max(1, round(height * scale))
