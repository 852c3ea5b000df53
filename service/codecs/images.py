"""Images as tensors: files decoded in this process, image tensors that clients send, and picture files back.

Pixels of files stay bytes: a quarter of the memory, and of the copies to a device, that floats need.
"""

import io
import zlib
from typing import Literal

import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from model.images.files import fitted_size
from model.images.tensors import to_byte_tensor, to_bytes, to_unit
from service.photos.decode import ImageRules, check_size, decode_image

PictureFormat = Literal["png", "jpeg", "webp"]
PngCompression = Literal["fast", "small"]

# Of photos, PNG's filters leave hardly anything that repeats: 256 pixels square take 4.7 ms and 118 KiB by
# runs alone, 15.7 ms and 118 KiB at level 6, 5.9 ms and 128 KiB at level 1 (AMD EPYC, one core).
_PNG_OPTIONS: dict[PngCompression, dict[str, int]] = {
    "fast": {"compress_level": 1, "compress_type": zlib.Z_RLE},
    "small": {"compress_level": 6},
}
_WRITE_OPTIONS: dict[PictureFormat, dict[str, int]] = {
    "jpeg": {"quality": 95, "subsampling": 0},
    "webp": {"quality": 95},
}


def read_image(data: bytes, rules: ImageRules, name: str = "the image") -> Tensor:
    """Bytes of an image file to RGB [3, S, S] uint8, a view of interleaved pixels.

    Raises:
        ServiceError: as `service.photos.decode.decode_image` does.
    """
    return to_byte_tensor(decode_image(data, rules, name))


def read_pixels(pixels: Tensor, rules: ImageRules, name: str = "the image") -> Tensor:
    """An image tensor [3, H, W], uint8 or float32 in [0, 1], to [3, S, S], fitted like a file.

    What must be resized becomes float32 in [0, 1].

    Raises:
        TooLargeError: more pixels than allowed.
        ImageError: too elongated.
    """
    height, width = pixels.shape[1:]
    check_size(width, height, rules, name)
    if (height, width) == (rules.side, rules.side):
        return pixels
    new_width, new_height = fitted_size(width, height, rules.side, rules.fit)
    resized = F.interpolate(
        to_unit(pixels)[None],
        size=(new_height, new_width),
        mode="bicubic",
        align_corners=False,
        antialias=True,
    )[0].clamp(0, 1)
    top, left = round((new_height - rules.side) / 2), round((new_width - rules.side) / 2)
    if rules.fit == "pad":
        right, bottom = rules.side - new_width + left, rules.side - new_height + top
        return F.pad(resized, (-left, right, -top, bottom), value=1.0)
    return resized[:, top : top + rules.side, left : left + rules.side].contiguous()


def write_picture(pixels: Tensor, picture_format: PictureFormat, png: PngCompression = "fast") -> bytes:
    """[3, H, W], bytes or in [0, 1], to the bytes of an image file."""
    picture = Image.fromarray(to_bytes(pixels).permute(1, 2, 0).numpy())
    buffer = io.BytesIO()
    options = _PNG_OPTIONS[png] if picture_format == "png" else _WRITE_OPTIONS[picture_format]
    picture.save(buffer, picture_format, **options)
    return buffer.getvalue()
