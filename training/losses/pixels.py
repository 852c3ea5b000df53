"""Losses on pixels: absolute and squared error, and the error of steps between neighbouring pixels."""

import torch
from torch import Tensor

from model.images.similarity import neighbour_differences
from training.recipes.recipe import LossConfig


def pixel_losses(
    reconstructions: Tensor, images: Tensor, weights: LossConfig, patch_size: int
) -> dict[str, Tensor]:
    """Scalars by the name of their weight: ``l1`` always, the others where they weigh something.

    Args:
        reconstructions, images: [B, 3, S, S] in [0, 1], reconstructions unclamped.
        weights: of the recipe.
        patch_size: side of the decoder's patches, pixels; ``differences`` counts those across their borders
            as much as those inside.
    """
    error = reconstructions - images
    losses = {"l1": error.abs().mean()}
    if weights.l2:
        losses["l2"] = error.square().mean()
    if weights.differences:
        losses["differences"] = torch.stack(neighbour_differences(error, patch_size)).mean()
    return losses
