"""Pictures as tensors, and the two scales that pixels have: bytes of 0 to 255, and numbers in [0, 1]."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from model.errors import ImageError

Images = Tensor | NDArray[Any]
FLOATS = frozenset({torch.float16, torch.bfloat16, torch.float32, torch.float64})
"""Types that PyTorch computes with."""
PIXEL_SLACK = 0.01
"""How far floats may exceed their range: the rounding of bfloat16 and more. Such values are clamped."""


def is_dense(tensor: Tensor) -> bool:
    """Whether a tensor has values, one after the other."""
    return tensor.layout == torch.strided and not (tensor.is_nested or tensor.is_meta)


def to_byte_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture to [3, H, W] uint8: a view, whose pixels stay interleaved as the picture has them."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture to [3, H, W] float32 in [0, 1]."""
    return to_unit(to_byte_tensor(picture)).contiguous()


def to_unit(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pixels to floating point in [0, 1]: bytes are divided by 255, floats stay.

    Args:
        pixels: any shape; uint8, or floating point in [0, 1].
        dtype: of the result.
    """
    unit = pixels.to(dtype)
    return unit / 255 if pixels.dtype == torch.uint8 else unit


def write_unit(pixels: Tensor, out: Tensor) -> None:
    """`to_unit` into a tensor of that shape, by a single kernel; floats are copied, whatever their range."""
    if pixels.dtype == torch.uint8:
        torch.div(pixels, 255, out=out)
    else:
        out.copy_(pixels, non_blocking=True)


def checked_images(images: Images, side: int) -> Tensor:
    """Images that a tokenizer can take, as a tensor; rounding errors beyond [0, 1] are clamped.

    Args:
        images: a tensor or NumPy array [B, 3, S, S], uint8, or floating point in [0, 1].
        side: S.

    Raises:
        ImageError: of another type, shape or range; says what to do where that can be guessed.
    """
    if isinstance(images, np.ndarray):
        try:
            images = torch.from_numpy(np.ascontiguousarray(images, images.dtype.newbyteorder("=")))
        except TypeError as exc:
            raise ImageError(f"images are a NumPy array of {images.dtype}, expected uint8 or floats") from exc
    if not isinstance(images, Tensor):
        raise ImageError(
            f"images are a {type(images).__name__}, expected a tensor or NumPy array [B, 3, {side}, {side}]"
        )
    if not is_dense(images):
        raise ImageError("images are no dense tensor with values: sparse, nested or on the meta device")
    if images.ndim != 4 or tuple(images.shape[1:]) != (3, side, side):
        hint = _shape_hint(images, side)
        raise ImageError(f"images have shape {list(images.shape)}, expected [B, 3, {side}, {side}]{hint}")
    if images.dtype == torch.uint8 or not images.numel():
        return images
    if images.dtype not in FLOATS:
        raise ImageError(f"images have dtype {images.dtype}, expected uint8, or floats in [0, 1]")
    return _clamped(images)


def _shape_hint(images: Tensor, side: int) -> str:
    shape = tuple(images.shape)
    if shape[-3:] == (side, side, 3):
        batch = "" if len(shape) == 4 else "[None]"
        axes = "0, 3, 1, 2"
        return f": channels come first, as images{batch}.permute({axes}) has them (NumPy: transpose)"
    return ": one image is a batch too, images[None]" if shape == (3, side, side) else ""


def _clamped(images: Tensor) -> Tensor:
    """Floats in [0, 1], by one reduction that NaN takes over."""
    low, high = torch.stack(torch.aminmax(images)).tolist()
    if low >= 0 and high <= 1:
        return images
    if low >= -PIXEL_SLACK and high <= 1 + PIXEL_SLACK:
        return images.clamp(0, 1)
    if not (math.isfinite(low) and math.isfinite(high)):
        raise ImageError("images hold a NaN or infinite value")
    if high > 4:
        hint = "divide by 255, or pass uint8"
    elif low < -0.5:
        hint = "if they are normalised, undo it: images * std + mean, or (images + 1) / 2 for [-1, 1]"
    else:
        hint = "clamp what a resize has added: images.clamp(0, 1)"
    raise ImageError(f"images have values from {low:g} to {high:g}, outside [0, 1]: {hint}")


def to_bytes(pixels: Tensor) -> Tensor:
    """[..., 3, H, W] in [0, 1] to uint8, rounded; bytes stay."""
    if pixels.dtype == torch.uint8:
        return pixels
    return pixels.mul(255).round_().clamp_(0, 255).to(torch.uint8)


def collate(inputs: Sequence[Tensor], pin_memory: bool = False) -> Tensor:
    """Items to a batch; where only some images are bytes, all become floats in [0, 1].

    Args:
        inputs: items of one shape.
        pin_memory: whether the batch is page-locked, as copies to and from a GPU beside other work need it.
    """
    if len({tensor.dtype for tensor in inputs}) > 1:
        inputs = [to_unit(tensor) for tensor in inputs]
    # Pictures as decoded are interleaved, and copied so: planes are made of them where the model runs.
    is_interleaved = not all(tensor.is_contiguous() for tensor in inputs)
    items = [tensor.movedim(0, -1) if is_interleaved else tensor for tensor in inputs]
    shape = (len(items), *items[0].shape)
    batch = torch.empty(shape, dtype=items[0].dtype, pin_memory=pin_memory)
    torch.stack(items, out=batch)
    return batch.movedim(-1, 1) if is_interleaved else batch


def dtype_name(dtype: torch.dtype) -> str:
    """``float16`` for ``torch.float16``."""
    return str(dtype).removeprefix("torch.")
