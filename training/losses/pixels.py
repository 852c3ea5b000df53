"""Losses on pixels: absolute and squared error, and the error of steps across patch borders."""

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
        patch_size: side of the decoder's patches, pixels, at whose borders ``seams`` looks.
    """
    error = reconstructions - images
    losses = {"l1": error.abs().mean()}
    if weights.l2:
        losses["l2"] = error.square().mean()
    if weights.seams:
        across, _ = neighbour_differences(error, patch_size)
        losses["seams"] = across.mean()
    return losses
