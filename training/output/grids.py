"""Grids of images and training curves, as PNG."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from torch import Tensor

from model.images.tensors import to_bytes

GAP = 4
LABEL_HEIGHT = 18


def reconstruction_grid(
    rows: Sequence[Tensor], labels: Sequence[str], captions: Sequence[Sequence[str]] | None = None
) -> Image.Image:
    """One labelled row per stage, one column per image.

    Args:
        rows: tensors [B, 3, S, S] in [0, 1], the same B and S.
        labels: a name for each row.
        captions: for each row a line below each of its images, cut to the image's width; empty for none.
    """
    num_columns, _, side, _ = rows[0].shape
    captions = captions or [()] * len(rows)
    width = num_columns * (side + GAP) + GAP
    heights = [LABEL_HEIGHT + side + GAP + LABEL_HEIGHT * bool(row) for row in captions]
    grid = Image.new("RGB", (width, sum(heights) + GAP), "white")
    draw = ImageDraw.Draw(grid)
    top = GAP
    for images, label, below, height in zip(rows, labels, captions, heights, strict=True):
        draw.text((GAP, top + 2), label, fill="black")
        for column, image in enumerate(images):
            grid.paste(to_image(image), (GAP + column * (side + GAP), top + LABEL_HEIGHT))
        for column, text in enumerate(below):
            place = (GAP + column * (side + GAP), top + LABEL_HEIGHT + side + 2)
            draw.text(place, _cut(draw, text, side), fill="black")
        top += height
    return grid


def _cut(draw: ImageDraw.ImageDraw, text: str, width: int) -> str:
    """The text's beginning, as far as it fits."""
    while text and draw.textlength(text) > width:
        text = text[:-1]
    return text


def to_image(pixels: Tensor) -> Image.Image:
    """[3, H, W] in [0, 1] to an 8-bit RGB image, rounded."""
    values = to_bytes(pixels.detach().float().cpu())
    return Image.fromarray(np.ascontiguousarray(values.permute(1, 2, 0).numpy()))


def save_image(image: Image.Image, file: Path) -> None:
    """Write a picture, creating its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    image.save(file)
