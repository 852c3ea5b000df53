"""Image files to pixels, with Pillow alone: what a decoder process runs, and `service.images` in this one.

Every picture is brought to RGB [S, S, 3], S the model's image size: EXIF orientation applied, colours
converted to sRGB by the embedded ICC profile where there is one, alpha composited on white, then
fitted. Of animations the first frame is taken. What a file may cost is judged from its header, before
any pixel is decoded.
"""

import struct
from dataclasses import dataclass

from PIL import Image, ImageFile

from model.errors import ImageError as ModelImageError
from model.opening import READABLE_FORMATS, open_picture, sniff
from model.pictures import DECODER_ERRORS, Fit, fit_picture
from service.errors import ImageError, MalformedError, TooLargeError


@dataclass(frozen=True)
class ImageRules:
    """What is accepted: most pixels, largest ratio of the sides, most frames; and the side and fit given."""

    side: int
    max_pixels: int
    max_aspect_ratio: float
    fit: Fit = "crop"
    max_frames: int = 1000


def decode_image(data: bytes, rules: ImageRules, name: str = "the image") -> Image.Image:
    """Bytes of an image file to an RGB picture of S x S pixels.

    Args:
        data: a JPEG, PNG, WebP, GIF, BMP or TIFF file.
        rules: limits, size and fit.
        name: how errors call the image, such as ``image 3``.

    Raises:
        MalformedError: not an image of a readable format, or a damaged one.
        TooLargeError: more pixels or frames than allowed.
        ImageError: too elongated, or of a pixel type that has no defined colours.
    """
    kind = sniff(data)
    if not data:
        raise MalformedError(f"{_capital(name)} is empty.")
    if kind is None:
        raise MalformedError(f"{_capital(name)} is not an image in a readable format ({READABLE_FORMATS}).")
    if kind == "PNG" and len(data) >= 24:  # so that a header alone is judged, whatever follows it
        width, height = struct.unpack(">II", data[16:24])
        check_size(width, height, rules, name)
    try:
        with open_picture(data) as picture:
            check_size(*picture.size, rules, name)
            _check_frames(picture.image, rules, name)
            rgb = picture.read()
    except Image.DecompressionBombError as exc:  # WebP and tiled TIFF: Pillow looks before we can
        raise TooLargeError(
            f"{_capital(name)} declares more pixels than can be decoded: {_reason(exc)}."
        ) from exc
    except ModelImageError as exc:
        raise ImageError(f"{_capital(name)} {exc}.") from exc
    except DECODER_ERRORS as exc:
        raise MalformedError(
            f"{_capital(name)} is a damaged or truncated {kind} file: {_reason(exc)}."
        ) from exc
    return fit_picture(rgb, rules.side, rules.fit)


def check_size(width: int, height: int, rules: ImageRules, name: str) -> None:
    """Judge an image by its size.

    Raises:
        MalformedError: no pixels at all.
        TooLargeError: more than allowed.
        ImageError: too elongated.
    """
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


def _check_frames(picture: ImageFile.ImageFile, rules: ImageRules, name: str) -> None:
    """Of several frames only the first is decoded, but even listing many costs time."""
    if getattr(picture, "is_animated", False) and getattr(picture, "n_frames", 1) > rules.max_frames:
        raise TooLargeError(
            f"{_capital(name)} has more than {rules.max_frames} frames, the most that are accepted."
        )


def _capital(name: str) -> str:
    return name[:1].upper() + name[1:]


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text[:200] or type(error).__name__
