"""Linear readouts: what a ridge regression from latent tokens to pixels recovers.

A fusion is judged by the readout of one token to its own patch, enriched less base: a decoder hides what
the latents hold behind its own quality, a linear map does not. A readout of the token and its eight
neighbours is what a trained decoder has to beat.

Shape legend: B batch, N tokens, C latent width, F features, P patch values (3 p^2), T = B * N.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from model.networks.decoder import Decoder
from model.tokenizer import LatentKind, Tokenizer
from training.data.batches import evaluation_batches
from training.data.sources import list_samples, spread_samples
from training.errors import DataError

# Down and right positive. Nearest first: a decoder with few heads takes as many as it has.
NEIGHBOURS = ((0, -1), (0, 1), (-1, 0), (1, 0), (-1, -1), (-1, 1), (1, -1), (1, 1))
NUM_IMAGES = 300
BATCH_SIZE = 16
PENALTY = 1e-4  # per row, in units of a feature's variance: as latent noise of deviation 0.01


class Ridge:
    """Sums of a ridge regression with an intercept, in float64.

    Args:
        num_features, num_targets: F and P.
        product_dtype: in which a batch's products are taken; float32 takes half the time, and its error is
            far below the penalty's effect.
    """

    def __init__(
        self, num_features: int, num_targets: int, product_dtype: torch.dtype = torch.float64
    ) -> None:
        self.product_dtype = product_dtype
        self.gram = torch.zeros(num_features + 1, num_features + 1, dtype=torch.float64)
        self.cross = torch.zeros(num_features + 1, num_targets, dtype=torch.float64)

    def add(self, features: Tensor, targets: Tensor) -> None:
        """Add rows: features [..., F], targets [..., P]."""
        rows, wanted = (part.flatten(0, -2).to("cpu", self.product_dtype) for part in (features, targets))
        rows = torch.cat([rows, rows.new_ones(len(rows), 1)], dim=1)
        self.gram += rows.T @ rows
        self.cross += rows.T @ wanted

    @property
    def num_rows(self) -> int:
        return int(self.gram[-1, -1])

    def solve(self, penalty: float) -> "LinearMap":
        """The minimum of the squared error plus ``penalty`` times the squared weights, intercept spared."""
        diagonal = torch.full((len(self.gram),), penalty, dtype=torch.float64)
        diagonal[-1] = 0.0
        return LinearMap(torch.linalg.solve(self.gram + diagonal.diag(), self.cross))


@dataclass(frozen=True)
class LinearMap:
    """Weights [F + 1, P] float64; the last row is the intercept."""

    weights: Tensor

    def __call__(self, features: Tensor) -> Tensor:
        """[..., F] -> [..., P], in the features' dtype and on their device."""
        weights = self.weights.to(features)
        return features @ weights[:-1] + weights[-1]

    def copy_to(self, layer: nn.Linear) -> None:
        """Make a layer [F -> P] this map; gradients must be off."""
        layer.weight.copy_(self.weights[:-1].T)
        layer.bias.copy_(self.weights[-1])


def shifted(tokens_BNC: Tensor, grid: int, offset: tuple[int, int]) -> Tensor:
    """Each token's neighbour at ``offset`` (rows, columns); beyond the border, the nearest token inside."""
    index = torch.arange(grid, device=tokens_BNC.device)
    rows, columns = ((index + step).clamp(0, grid - 1) for step in offset)
    return tokens_BNC.unflatten(1, (grid, grid))[:, rows][:, :, columns].flatten(1, 2)


def neighbourhood(tokens_BNC: Tensor, grid: int) -> Tensor:
    """Each token and its eight neighbours, in the order of `NEIGHBOURS`: [B, N, 9 C]."""
    return torch.cat([tokens_BNC, *(shifted(tokens_BNC, grid, offset) for offset in NEIGHBOURS)], dim=-1)


class ReadoutFit:
    """Fits both readouts of one kind of latents, batch by batch."""

    def __init__(self, decoder: Decoder, width: int) -> None:
        self.decoder = decoder
        num_targets = decoder.predict.out_features
        self.one = Ridge(width, num_targets)
        self.nine = Ridge((len(NEIGHBOURS) + 1) * width, num_targets, torch.float32)

    def add(self, tokens_BNC: Tensor, images: Tensor) -> None:
        """Latent tokens, and their images [B, 3, S, S] in [0, 1]."""
        patches = self.decoder.patchify(images)
        self.one.add(tokens_BNC, patches)
        self.nine.add(neighbourhood(tokens_BNC, self.decoder.grid), patches)

    def solve(self) -> "Readouts":
        maps = (ridge.solve(PENALTY * ridge.num_rows) for ridge in (self.one, self.nine))
        return Readouts(self.decoder, *maps)


@dataclass(frozen=True)
class Readouts:
    """Linear decoders of latent tokens: of a token alone, and of its 3x3 neighbourhood."""

    decoder: Decoder
    one: LinearMap
    nine: LinearMap

    def images(self, tokens_BNC: Tensor) -> tuple[Tensor, Tensor]:
        """Images of both readouts, [B, 3, S, S] each, clamped to [0, 1]."""
        patches = (self.one(tokens_BNC), self.nine(neighbourhood(tokens_BNC, self.decoder.grid)))
        one, nine = (self.decoder.to_pixels(p).clamp(0, 1) for p in patches)
        return one, nine


@torch.no_grad()
def fit_readouts(
    tokenizer: Tokenizer, paths: Sequence[Path], latents: Sequence[LatentKind]
) -> dict[LatentKind, Readouts]:
    """Readouts of each kind of latents, fitted on at most 300 images, spread over folders or shards.

    Raises:
        DataError: no image could be decoded.
    """
    width = tokenizer.config.encoder.width
    fits = {latent: ReadoutFit(tokenizer.decoder, width) for latent in latents}
    samples = spread_samples(list_samples(paths), NUM_IMAGES)
    for _, batch in evaluation_batches(samples, tokenizer.config.image_size, BATCH_SIZE):
        images = batch.pixels(tokenizer.device)
        hidden_states = tokenizer.encoder(tokenizer.preprocess(images))
        for latent, fit in fits.items():
            fit.add(tokenizer.tokens_of(hidden_states, latent).float(), images)
    if not all(fit.one.num_rows for fit in fits.values()):
        raise DataError(f"readout: none of the {len(samples)} images could be decoded")
    return {latent: fit.solve() for latent, fit in fits.items()}
