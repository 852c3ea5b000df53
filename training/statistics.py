"""Mean and variance of enriched latents per position, as generators need them.

Shape legend: B batch, C latent width, h w latent grid.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from model.tokenizer import Tokenizer
from training.data import evaluation_batches
from training.errors import DataError
from training.sources import list_samples

STATISTICS_BATCH_SIZE = 32
STATISTICS_LIMIT = 2048


@torch.no_grad()
def latent_statistics(
    tokenizer: Tokenizer, paths: Sequence[Path], limit: int = STATISTICS_LIMIT
) -> tuple[Tensor, Tensor]:
    """Streaming mean and biased variance of the enriched latents of centre-cropped images.

    Batches are merged in float64 by Chan's parallel update, so that no sum of squares cancels.

    Args:
        tokenizer: gives the latents.
        paths: folders or tar shards.
        limit: about how many images are used, spread evenly over the paths.

    Returns:
        Mean and variance, each [C, h, w] float32.

    Raises:
        DataError: no image could be decoded.
    """
    count = 0
    mean = torch.zeros(tokenizer.config.latent_shape, dtype=torch.float64)
    squares = torch.zeros_like(mean)
    samples = list_samples(paths)
    samples = samples[:: max(1, len(samples) // limit)]
    for _, batch in evaluation_batches(samples, tokenizer.config.image_size, STATISTICS_BATCH_SIZE):
        latents = tokenizer.encode(batch.pixels(tokenizer.device)).double().cpu()
        added = len(latents)
        batch_mean = latents.mean(dim=0)
        delta = batch_mean - mean
        total = count + added
        squares += (latents - batch_mean).square().sum(dim=0) + delta.square() * (count * added / total)
        mean += delta * (added / total)
        count = total
    if count == 0:
        raise DataError("latent statistics: no image could be decoded")
    return mean.float(), (squares / count).float()
