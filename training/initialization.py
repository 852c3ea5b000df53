"""A decoder that starts as the best linear one, for machines that cannot afford to learn it.

From ViT's usual initialisation a decoder spends its first thousands of steps rediscovering that pixels
are nearly linear in the latents. Here its embedding is orthonormal and orthogonal to the fixed positions,
its blocks start as the identity (their output maps are zero), and its last layer is the ridge regression
of pixels on what the final norm then gives. A decoder that sees one token at a time makes a mosaic, so
the heads of its first blocks may start as pointers to the neighbours: each attends to one offset and adds
what the linear readout of the 3x3 neighbourhood takes from there. Training goes on with nothing frozen.

Shape legend: B batch, N tokens, C latent width, D decoder width, E head width, R room for neighbours,
P patch values (3 p^2).
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model.decoder import Decoder
from model.pixels import to_unit
from model.tokenizer import LatentKind, Tokenizer
from model.vit import Block, initialize_linear
from training.data import evaluation_batches
from training.errors import DataError
from training.pointers import POSITION_TOLERANCE, point_at_neighbours
from training.progress import log_progress
from training.readout import NEIGHBOURS, PENALTY, Ridge, neighbourhood
from training.sources import list_samples, spread_samples

logger = logging.getLogger(__name__)

BATCH_SIZE = 16
EMBED_GAIN = 2.0  # above the positions' own scale of 0.7, so that the final norm hardly sees them
PENALTY_OF_LAST_LAYER = 1e-6  # per row: it only keeps directions that hold nothing at zero


@dataclass(frozen=True)
class DecoderStart:
    """What the decoder is fitted to.

    Attributes:
        latent: which latents it is to decode.
        noise_tau: latent noise of the training that follows, which the regression allows for.
        with_neighbours: the readout of the 3x3 neighbourhood, as far as there are heads and room for it.
        num_images: used at most, spread over the data.
    """

    latent: LatentKind = "base"
    noise_tau: float = 0.0
    with_neighbours: bool = False
    num_images: int = 300


@torch.no_grad()
def initialize_decoder(
    tokenizer: Tokenizer, paths: Sequence[Path], start: DecoderStart, generator: torch.Generator
) -> None:
    """Set the decoder to the ridge regression of patches on latents.

    Args:
        tokenizer: gives the latents; its decoder is overwritten.
        paths: folders or tar shards.
        start: of what latents, and of how much around a token.
        generator: of the embedding and the noise, on the CPU.

    Raises:
        DataError: no image could be decoded.
    """
    found = []
    samples = spread_samples(list_samples(paths), start.num_images)
    batches = evaluation_batches(samples, tokenizer.config.image_size, BATCH_SIZE)
    num_batches = -(-len(samples) // BATCH_SIZE)
    for _, batch in log_progress(batches, num_batches, "the decoder's ridge regression"):
        tokens = tokenizer.tokens(batch.pixels(tokenizer.device), start.latent)
        sigma = start.noise_tau * torch.rand(len(tokens), 1, 1, generator=generator)
        noise = sigma * torch.randn(tokens.shape, generator=generator)
        found.append((tokens + noise.to(tokens), batch.images))
    if not found:
        raise DataError("decoder initialisation: no image could be decoded")
    fit_decoder(tokenizer.decoder, found, start.with_neighbours, generator)


@torch.no_grad()
def fit_decoder(
    decoder: Decoder,
    batches: Sequence[tuple[Tensor, Tensor]],
    with_neighbours: bool,
    generator: torch.Generator,
) -> None:
    """As `initialize_decoder`, from latent tokens [B, N, C] and their images [B, 3, S, S] uint8."""
    basis_DF = _make_linear(decoder, generator)
    width, num_targets = decoder.embed.in_features, decoder.predict.out_features
    content, free = basis_DF[:, :width], basis_DF[:, width:]
    if with_neighbours and free.shape[1]:
        ridge = Ridge((len(NEIGHBOURS) + 1) * width, num_targets, torch.float32)
        for tokens, images in batches:
            ridge.add(neighbourhood(tokens, decoder.grid), decoder.patchify(to_unit(images)))
        readout = ridge.solve(PENALTY * ridge.num_rows)
        point_at_neighbours(decoder, content, free, EMBED_GAIN, readout, batches)
    ridge = Ridge(decoder.predict.in_features, num_targets)
    for tokens, images in batches:
        ridge.add(decoder.features(tokens), decoder.patchify(to_unit(images)))
    weights = ridge.solve(PENALTY_OF_LAST_LAYER * ridge.num_rows).weights
    decoder.predict.weight.copy_(weights[:-1].T)
    decoder.predict.bias.copy_(weights[-1])
    logger.info("the decoder starts as a ridge regression on %d tokens", ridge.num_rows)


def _make_linear(decoder: Decoder, generator: torch.Generator) -> Tensor:
    """Blocks to the identity, embedding to an orthonormal map that avoids the positions.

    Returns:
        Orthonormal directions [D, F]: the first C are the embedding's; more, where there is room for them,
        hold nothing.
    """
    decoder.apply(initialize_linear)
    for module in decoder.modules():
        if isinstance(module, nn.LayerNorm):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, Block):
            nn.init.zeros_(module.attention.out.weight)
            nn.init.zeros_(module.mlp.down.weight)
    nn.init.zeros_(decoder.class_token)
    positions = decoder.positions[0, 1:].double().cpu()
    avoided = torch.cat([positions, torch.ones(1, positions.shape[1], dtype=torch.float64)])
    basis = _complement(avoided, decoder.embed.in_features, generator)
    decoder.embed.weight.copy_(EMBED_GAIN * basis[:, : decoder.embed.in_features])
    return basis


def _complement(avoided_ND: Tensor, num_directions: int, generator: torch.Generator) -> Tensor:
    """Orthonormal directions [D, F] outside the span of what is to be avoided, all there are.

    Where fewer than ``num_directions`` are left, that many directions of the whole space.
    """
    width = avoided_ND.shape[1]
    _, values, rows = torch.linalg.svd(avoided_ND, full_matrices=False)
    span = rows[values > POSITION_TOLERANCE * values[0]]
    count = max(num_directions, width - len(span))
    directions = torch.randn(width, count, generator=generator, dtype=torch.float64)
    if num_directions > width:
        return torch.linalg.qr(directions.T).Q.T
    if len(span) + count <= width:
        directions = directions - span.T @ (span @ directions)
    return torch.linalg.qr(directions).Q
