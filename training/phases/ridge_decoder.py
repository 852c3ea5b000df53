"""A decoder that starts as the best linear one, for machines that cannot afford to learn it.

From ViT's usual initialisation a decoder spends its first thousands of steps rediscovering that pixels
are nearly linear in the latents. Here its blocks start as the identity (their output maps are zero), its
embedding is orthonormal and orthogonal to the fixed positions, and its last layer is the ridge regression
of pixels on what the final norm then gives. Training goes on from there with nothing frozen.

Shape legend: B batch, N tokens, C latent width, D decoder width, P patch values (3 p^2).
"""

import logging
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from model.networks.decoder import Decoder
from model.networks.vit import Block
from model.tokenizer import Tokenizer
from training.data.batches import evaluation_batches
from training.data.sources import Sample, spread_samples
from training.errors import DataError
from training.evaluation.readout import Ridge
from training.output.progress import log_progress

logger = logging.getLogger(__name__)

NUM_IMAGES = 512
BATCH_SIZE = 16
EMBED_GAIN = 2.0  # above the positions' own scale of 0.7, so that the final norm hardly sees them
PENALTY = 30.0


@torch.no_grad()
def initialize_decoder(
    tokenizer: Tokenizer, samples: Sequence[Sample], noise_tau: float, generator: torch.Generator
) -> None:
    """Set the decoder to the ridge regression of patches on base latents.

    Args:
        tokenizer: its encoder gives the latents; its decoder is overwritten.
        samples: training images; at most 512 of them are used, spread evenly.
        noise_tau: latent noise of the training that follows, which the regression allows for.
        generator: of the embedding and the noise, on the CPU.

    Raises:
        DataError: no image could be decoded.
    """
    decoder = tokenizer.decoder
    _make_linear(decoder, generator)
    ridge = Ridge(decoder.predict.in_features, decoder.predict.out_features)
    samples = spread_samples(samples, NUM_IMAGES)
    batches = evaluation_batches(samples, tokenizer.config.image_size, BATCH_SIZE)
    num_batches = -(-len(samples) // BATCH_SIZE)
    for _, batch in log_progress(batches, num_batches, "the decoder's ridge regression"):
        images = batch.pixels(tokenizer.device)
        tokens = tokenizer.tokens(images, "base")
        sigma = noise_tau * torch.rand(len(tokens), 1, 1, generator=generator)
        noise = sigma * torch.randn(tokens.shape, generator=generator)
        ridge.add(decoder.features(tokens + noise.to(tokens)), decoder.patchify(images))
    if not ridge.num_rows:
        raise DataError("decoder initialisation: no image could be decoded")
    ridge.solve(PENALTY).copy_to(decoder.predict)
    logger.info("the decoder starts as a ridge regression on %d tokens", ridge.num_rows)


def _make_linear(decoder: Decoder, generator: torch.Generator) -> None:
    """Blocks to the identity, embedding to an orthonormal map that avoids the positions."""
    for block in decoder.blocks:
        assert isinstance(block, Block)
        for layer in (block.attention.out, block.mlp.down):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)
    basis = _complement(decoder.positions[0, 1:].double().cpu(), decoder.embed.in_features, generator)
    decoder.embed.weight.copy_(EMBED_GAIN * basis)
    nn.init.zeros_(decoder.embed.bias)


def _complement(positions_ND: Tensor, num_directions: int, generator: torch.Generator) -> Tensor:
    """Orthonormal directions [D, C], outside the span of the positions where there is room for them."""
    width = positions_ND.shape[1]
    directions = torch.randn(width, num_directions, generator=generator, dtype=torch.float64)
    _, values, rows = torch.linalg.svd(positions_ND, full_matrices=False)
    span = rows[values > 1e-6 * values[0]]
    if len(span) + num_directions <= width:
        directions = directions - span.T @ (span @ directions)
    if num_directions > width:
        return torch.linalg.qr(directions.T).Q.T
    return torch.linalg.qr(directions).Q
