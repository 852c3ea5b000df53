"""Pictures as tensors, and the two scales that pixels have: bytes of 0 to 255, and numbers in [0, 1]."""

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def to_byte_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture to [3, H, W] uint8: a view, whose pixels stay interleaved as the picture has them."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def to_tensor(picture: Image.Image) -> Tensor:
    """An RGB picture to [3, H, W] float32 in [0, 1]."""
    return to_unit(to_byte_tensor(picture)).contiguous()


def to_unit(pixels: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Pixels to floating point in [0, 1]: bytes are divided by 255, what is in [0, 1] stays.

    Args:
        pixels: any shape; uint8, or floating point in [0, 1].
        dtype: of the result.
    """
    unit = pixels.to(dtype)
    return unit / 255 if pixels.dtype == torch.uint8 else unit


def to_bytes(pixels: Tensor) -> Tensor:
    """[..., 3, H, W] in [0, 1] to uint8, rounded."""
    return pixels.mul(255).round().clamp(0, 255).to(torch.uint8)
