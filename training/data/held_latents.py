"""Latents of a small listing, encoded once and held on the device: training then reads no image.

Shape legend: B batch, F 2 with flipped images or 1, C latent channels, h w latent grid.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor
from tqdm import tqdm

from model.tokenizer import LatentKind, Tokenizer
from training.data.batches import PositionSampler, ShuffledEpochs
from training.data.passes import default_workers, read_batches
from training.data.sources import Sample
from training.distributed.ranks import Ranks
from training.errors import DataError

ENCODE_BATCH_SIZE = 64


@dataclass(frozen=True)
class HeldLatents:
    """Raw latents of centre-cropped images.

    Attributes:
        latents: [images, F, C, h, w] on the device.
        labels: [images] int64 on the device.
        num_broken: images that could not be decoded and are not among them.
    """

    latents: Tensor
    labels: Tensor
    num_broken: int

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance per position, each [C, h, w] float32; two passes, in float64."""
        count = self.latents.shape[0] * self.latents.shape[1]
        mean = _sum_of(self.latents, lambda part: part) / count
        var = _sum_of(self.latents, lambda part: (part - mean).square()) / count
        return mean.float(), var.float()

    def balanced_rows(self) -> list[int]:
        """Image numbers, those of small classes several times, so that all classes come about as often."""
        labels = self.labels.tolist()
        counts = Counter(labels)
        largest = max(counts.values())
        return [row for row, label in enumerate(labels) for _ in range(round(largest / counts[label]))]


def hold_latents(
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    latent: LatentKind,
    flip: bool,
    dtype: torch.dtype,
    progress: bool = True,
) -> HeldLatents:
    """Encode every image, and its mirror image where ``flip`` is set.

    Raises:
        DataError: no image could be decoded, or a latent is too large for ``dtype``.
    """
    device = tokenizer.device
    kept: list[int] = []
    encoded: list[Tensor] = []
    batches = read_batches(
        samples, range(len(samples)), tokenizer.config.image_size, ENCODE_BATCH_SIZE, default_workers(device)
    )
    with tqdm(total=len(samples), unit="image", desc="latents", disable=not progress) as bar:
        for chunk, readable, batch in batches:
            if batch is not None:
                pixels = batch.pixels(device)
                views = [pixels, pixels.flip(-1)] if flip else [pixels]
                stacked = torch.stack([tokenizer.latents(view, latent) for view in views], dim=1)
                encoded.append(stacked.to(dtype))
                kept += readable
            bar.update(len(chunk))
    if not kept:
        raise DataError(f"none of the {len(samples)} images could be decoded")
    latents = torch.cat(encoded)
    if not torch.isfinite(latents).all():
        raise DataError(f"a latent is too large for {dtype}: hold them as float32")
    labels = [sample.label if sample.label is not None else -1 for sample in (samples[p] for p in kept)]
    return HeldLatents(latents, torch.tensor(labels, device=device), len(samples) - len(kept))


def shuffled(
    rows: Sequence[int], batch_size: int, seed: int, start_batch: int, ranks: Ranks
) -> Iterator[list[int]]:
    """This rank's share of endless batches of ``rows``, from batch ``start_batch`` on."""
    epochs = ShuffledEpochs(len(rows), seed)
    positions = iter(PositionSampler(start_batch * batch_size, batch_size, ranks))
    while True:
        share = islice(positions, batch_size // ranks.size)
        yield [rows[epochs.index(*divmod(position, len(rows)))] for position in share]


def _sum_of(latents: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Sum over images and flips of ``change`` of float64 parts, [C, h, w]."""
    parts = (change(part.double()).sum(dim=(0, 1)) for part in latents.split(ENCODE_BATCH_SIZE))
    return torch.stack(list(parts)).sum(dim=0)
