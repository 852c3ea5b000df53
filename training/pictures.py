"""Grids of images and training curves, as PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from model.pixels import to_bytes

GAP = 4
LABEL_HEIGHT = 18


def reconstruction_grid(rows: Sequence[Tensor], labels: Sequence[str]) -> Image.Image:
    """One labelled row a stage, one column an image.

    Args:
        rows: tensors [B, 3, S, S] in [0, 1], the same B and S.
        labels: a name for each row.
    """
    num_columns, _, side, _ = rows[0].shape
    width = num_columns * (side + GAP) + GAP
    grid = Image.new("RGB", (width, len(rows) * (side + GAP + LABEL_HEIGHT) + GAP), "white")
    draw = ImageDraw.Draw(grid)
    for row, (images, label) in enumerate(zip(rows, labels, strict=True)):
        top = GAP + row * (side + GAP + LABEL_HEIGHT)
        draw.text((GAP, top + 2), label, fill="black")
        for column, image in enumerate(images):
            grid.paste(to_image(image), (GAP + column * (side + GAP), top + LABEL_HEIGHT))
    return grid


def to_image(pixels: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] to an 8-bit RGB image, rounded."""
    values = to_bytes(pixels.detach().float().cpu())
    return Image.fromarray(np.ascontiguousarray(values.permute(1, 2, 0).numpy()))


def save_image(image: Image.Image, file: Path) -> None:
    """Write a picture, creating its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
