"""Image files to pixels, without PyTorch. Decoder processes and `service.codecs.images` run it.

Every picture is brought to RGB [S, S, 3], S the model's image size: EXIF orientation applied, colours
converted to sRGB by the embedded ICC profile where there is one, alpha composited on white, then
fitted. Of animations the first frame is taken. What a file may cost is judged from its header, before
any pixel is decoded.
"""

from dataclasses import dataclass
from typing import NamedTuple

from PIL import Image, ImageFile

from model.errors import ImageError as ModelImageError
from model.errors import PictureCostError
from model.images.costs import MAX_FRAMES, Extent, check_parts, measure_picture
from model.images.files import DECODER_ERRORS, Fit, fit_picture, fitted_size
from model.images.opening import READABLE_FORMATS, OpenPicture, open_picture, sniff
from model.images.quick import REDUCING_GAP, fit_quickly
from service.errors import ImageError, MalformedError, TooLargeError

UNKNOWN_PIXELS = 2**20
"""Assumed of a file whose header does not tell its size; one that has more is refused."""


class ImagePart(NamedTuple):
    """An image file of a body, and how errors call it."""

    name: str
    data: bytes


@dataclass(frozen=True)
class ImageRules:
    """Limits of an image (pixels, ratio of the sides, frames), and the side and fit of the result.

    ``exact`` results are those of training, bit by bit; others are close to them, and made faster.
    """

    side: int
    max_pixels: int
    max_aspect_ratio: float
    fit: Fit = "crop"
    max_frames: int = MAX_FRAMES
    exact: bool = True


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
        raise MalformedError(f"{capital(name)} is empty.")
    if kind is None:
        raise MalformedError(f"{capital(name)} is not an image in a readable format ({READABLE_FORMATS}).")
    try:
        extent = measure_picture(data)
        if extent is not None:  # so that a header alone is judged, whatever follows it
            check_extent(extent, rules, name)
        check_parts(data, rules.max_frames)
        with open_picture(data) as picture:
            check_size(*picture.size, rules, name)
            _check_opened(picture.image, extent, rules)
            return _read_fitted(picture, rules)
    except Image.DecompressionBombError as exc:  # WebP and tiled TIFF: Pillow looks before we can
        raise TooLargeError(
            f"{capital(name)} declares more pixels than can be decoded: {_reason(exc)}."
        ) from exc
    except PictureCostError as exc:
        raise TooLargeError(f"{capital(name)} {exc}.") from exc
    except ModelImageError as exc:
        raise ImageError(f"{capital(name)} {exc}.") from exc
    except DECODER_ERRORS as exc:
        raise MalformedError(
            f"{capital(name)} is a damaged or truncated {kind} file: {_reason(exc)}."
        ) from exc


def _read_fitted(picture: OpenPicture, rules: ImageRules) -> Image.Image:
    if rules.exact:
        return fit_picture(picture.read(), rules.side, rules.fit)
    width, height = fitted_size(*picture.size, rules.side, rules.fit)
    reduced, box = picture.read_reduced(REDUCING_GAP * width, REDUCING_GAP * height)
    return fit_quickly(reduced, box, rules.side, rules.fit)


def check_size(width: int, height: int, rules: ImageRules, name: str) -> None:
    """Judge an image by its size.

    Raises:
        MalformedError: no pixels at all.
        TooLargeError: more than allowed.
        ImageError: too elongated.
    """
    if width < 1 or height < 1:
        raise MalformedError(f"{capital(name)} declares a size of {width}x{height} pixels.")
    if width * height > rules.max_pixels:
        raise TooLargeError(
            f"{capital(name)} declares {width}x{height} = {width * height} pixels; "
            f"at most {rules.max_pixels} are accepted."
        )
    ratio = max(width, height) / min(width, height)
    if ratio > rules.max_aspect_ratio:
        raise ImageError(
            f"{capital(name)} is {width}x{height} pixels, sides in a ratio of {ratio:.0f}; "
            f"at most {rules.max_aspect_ratio:g} is accepted."
        )


def check_extent(extent: Extent, rules: ImageRules, name: str) -> None:
    """Judge an image by its header: its size, and the tiles that its decoder has to compute whole.

    Raises:
        ServiceError: as `check_size` does.
    """
    check_size(extent.width, extent.height, rules, name)
    if extent.coded_pixels > rules.max_pixels:
        raise TooLargeError(
            f"{capital(name)} has tiles of {extent.coded_pixels} pixels in total; "
            f"at most {rules.max_pixels} are accepted."
        )


def _check_opened(picture: ImageFile.ImageFile, extent: Extent | None, rules: ImageRules) -> None:
    """Compare the decoder's findings with the header by which the file was judged.

    Raises:
        OSError: it has more pixels.
        PictureCostError: more frames than allowed; only the first is decoded, but listing many costs time.
    """
    expected = max(extent.coded_pixels if extent is not None else 0, UNKNOWN_PIXELS)
    if picture.width * picture.height > expected:
        raise OSError(f"it is {picture.width}x{picture.height} pixels, and its header says otherwise")
    knows_frames = picture.format in ("PNG", "WEBP")  # those of others were counted
    if knows_frames and getattr(picture, "n_frames", 1) > rules.max_frames:
        raise PictureCostError(f"has more than {rules.max_frames} frames, the most that are accepted")


def capital(name: str) -> str:
    """An image's name at the beginning of a sentence."""
    return name[:1].upper() + name[1:]


def _reason(error: Exception) -> str:
    text = " ".join(str(error).split()).rstrip(".")
    return text[:200] or type(error).__name__
