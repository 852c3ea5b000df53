"""Training batches: a pure function of (seed, position), so that a resumed run sees the same data.

Shape legend: B batch, S side in pixels.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from model.errors import ImageError
from model.images.costs import check_parts, measure_picture
from model.images.files import DECODER_ERRORS, fit_picture, fitted_size
from model.images.opening import open_picture
from model.images.tensors import to_byte_tensor
from training.data.sources import Sample
from training.data.workers import ignore_signals, iterate
from training.distributed.ranks import Ranks
from training.errors import DataError
from training.recipes.recipe import DataConfig

logger = logging.getLogger(__name__)

MAX_PIXELS = 64 * 2**20
# Pickles: processes that decode images are started by spawn or forkserver on some systems.
Transform = Callable[[Image.Image, np.random.Generator], Image.Image]
Item = tuple[Tensor, int, int, Tensor | None]  # image, label, number of broken ones before it, states
CROP = 7  # beside order (0), augmentation (1) and the purposes of `training.data.randomness`


class StoredCrop(NamedTuple):
    """A crop, [3, S, S] uint8, and what the frozen parts give for it, [L, N, C]."""

    pixels: Tensor
    states: Tensor


class StoredCrops(Protocol):
    """Crops and their states from a cache (`training.data.cache`)."""

    def read(self, index: int, variant: int) -> StoredCrop | None:
        """One crop of one listed image; None where the image could not be decoded."""


@dataclass(frozen=True)
class Batch:
    """Images with their labels.

    Attributes:
        images: [B, 3, S, S] uint8.
        labels: [B] int64, -1 where the source names no class.
        num_broken: samples that could not be decoded and were replaced by their successor.
        states: [B, L, N, C] of these very crops, where there is a cache.
    """

    images: Tensor
    labels: Tensor
    num_broken: int
    states: Tensor | None = None

    def pixels(self, device: torch.device) -> Tensor:
        """Images as float32 [B, 3, S, S] in [0, 1] on ``device``."""
        return self.images.to(device, non_blocking=True).float() / 255


def decode_image(data: bytes) -> Image.Image:
    """Decode to RGB as the service does (`model.images.opening`).

    Raises:
        DataError: not an image, truncated, or larger than 64 megapixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's remarks about metadata say nothing of the pixels
            extent = measure_picture(data)
            if extent is not None and extent.coded_pixels > MAX_PIXELS:
                raise DataError(f"{extent.coded_pixels} pixels to decode exceed the limit of {MAX_PIXELS}")
            check_parts(data)
            with open_picture(data) as picture:
                width, height = picture.size
                if width * height > MAX_PIXELS:
                    raise DataError(f"{width}x{height} pixels exceed the limit of {MAX_PIXELS}")
                return picture.read()
    except DataError:
        raise
    except ImageError as exc:
        raise DataError(str(exc)) from exc
    except (*DECODER_ERRORS, Image.DecompressionBombError) as exc:
        raise DataError(f"not a readable image: {exc}") from exc


def resize_short_side(image: Image.Image, side: int) -> Image.Image:
    """Antialiased bicubic resize that makes the short side ``side`` pixels."""
    size = fitted_size(*image.size, side, "crop")
    return image if size == image.size else image.resize(size, Image.Resampling.BICUBIC)


def crop_at(image: Image.Image, left: int, top: int, side: int) -> Image.Image:
    """The square of ``side`` pixels at (left, top)."""
    return image.crop((left, top, left + side, top + side))


def random_crop(config: DataConfig, side: int) -> Transform:
    """Short side to a random size of ``config.resize_short_side``, random crop, optional flip (RAE)."""
    return partial(_random_crop, config, side)


def random_resized_crop(config: DataConfig, side: int) -> Transform:
    """A random square of ``config.crop_area`` of the image, resized to ``side`` (Inception)."""
    return partial(_random_resized_crop, config, side)


def center_crop(config: DataConfig, side: int) -> Transform:
    """The centre at the model's size, as it is served, and an optional flip."""
    return partial(_center_crop, config, side)


def _center_crop(config: DataConfig, side: int, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    return _random_flip(fit_picture(image, side), rng, config.flip)


def _random_crop(config: DataConfig, side: int, image: Image.Image, rng: np.random.Generator) -> Image.Image:
    low, high = config.resize_short_side
    image = resize_short_side(image, max(side, int(rng.integers(low, high + 1))))
    left = int(rng.integers(0, image.width - side + 1))
    top = int(rng.integers(0, image.height - side + 1))
    return _random_flip(crop_at(image, left, top, side), rng, config.flip)


def _random_resized_crop(
    config: DataConfig, side: int, image: Image.Image, rng: np.random.Generator
) -> Image.Image:
    low, high = config.crop_area
    length = round((image.width * image.height * rng.uniform(low, high)) ** 0.5)
    length = max(1, min(length, *image.size))
    left = int(rng.integers(0, image.width - length + 1))
    top = int(rng.integers(0, image.height - length + 1))
    box = (left, top, left + length, top + length)
    image = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    return _random_flip(image, rng, config.flip)


def _random_flip(image: Image.Image, rng: np.random.Generator, enabled: bool) -> Image.Image:
    return ImageOps.mirror(image) if enabled and rng.random() < 0.5 else image


def fixed_crop(image: Image.Image, transform: Transform, seed: int, index: int, variant: int) -> Image.Image:
    """Crop number ``variant`` of the listed image ``index``: the same in every epoch."""
    return transform(image, np.random.default_rng((seed, CROP, index, variant)))


class ShuffledEpochs:
    """The order of samples: epoch e visits them in a permutation drawn from (seed, e)."""

    def __init__(self, num_samples: int, seed: int) -> None:
        self.num_samples = num_samples
        self.seed = seed
        self._epoch = -1
        self._order = np.empty(0, dtype=np.int64)

    def index(self, epoch: int, offset: int) -> int:
        """Which sample is at a place of an epoch; behind the last one comes the first."""
        if epoch != self._epoch:
            self._order = np.random.default_rng((self.seed, 0, epoch)).permutation(self.num_samples)
            self._epoch = epoch
        return int(self._order[offset % self.num_samples])


class PositionedDataset(Dataset[Item]):
    """Maps a position in the endless training stream to a sample.

    Augmentation is drawn from (seed, position), or, of a fixed number of crops of each image, epoch e takes
    number e modulo that. Nothing depends on what was read before.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        transform: Transform,
        seed: int,
        crops_per_image: int | None = None,
        stored: StoredCrops | None = None,
    ) -> None:
        self.samples = samples
        self.transform = transform
        self.seed = seed
        self.crops_per_image = crops_per_image
        self.stored = stored
        self.epochs = ShuffledEpochs(len(samples), seed)

    def __getitem__(self, position: int) -> Item:
        epoch, offset = divmod(position, len(self.samples))
        for num_broken in range(len(self.samples)):
            index = self.epochs.index(epoch, offset + num_broken)
            found = self._crop(position, epoch, index)
            if found is not None:
                label = self.samples[index].label
                return found[0], -1 if label is None else label, num_broken, found[1]
        raise DataError(f"none of the {len(self.samples)} listed images could be decoded")

    def _crop(self, position: int, epoch: int, index: int) -> tuple[Tensor, Tensor | None] | None:
        """One crop of a listed image, with its states where there is a cache; None where it is broken."""
        variant = epoch % (self.crops_per_image or 1)
        if self.stored is not None:
            return self.stored.read(index, variant)
        sample = self.samples[index]
        try:
            image = decode_image(sample.read())
        except (DataError, OSError) as exc:
            logger.warning("skipped %s in %s: %s", sample.key, sample.file, exc)
            return None
        if self.crops_per_image is None:
            crop = self.transform(image, np.random.default_rng((self.seed, 1, position)))
        else:
            crop = fixed_crop(image, self.transform, self.seed, index, variant)
        return to_byte_tensor(crop), None


class PositionSampler(Sampler[int]):
    """Yields the endless stream's positions from ``start``: of each global batch, this rank's share.

    A share is a run of consecutive positions, so that the ranks' batches laid end to end are the batch
    that one process would see.
    """

    def __init__(self, start: int, batch_size: int, ranks: Ranks) -> None:
        self.start = start
        self.batch_size = batch_size
        self.share = share_of_batch(batch_size, ranks)

    def __iter__(self) -> Iterator[int]:
        first = self.start
        while True:
            yield from (first + index for index in self.share)
            first += self.batch_size


def share_of_batch(batch_size: int, ranks: Ranks) -> range:
    """Which samples of a global batch are this rank's.

    Raises:
        ValueError: the batch cannot be shared equally, which means over samples rely on.
    """
    size, rest = divmod(batch_size, ranks.size)
    if rest:
        raise ValueError(f"a batch of {batch_size} images does not divide among {ranks.size} ranks")
    return range(ranks.rank * size, (ranks.rank + 1) * size)


def share_of_step(batch_size: int, num_micro_batches: int, number: int, ranks: Ranks) -> range:
    """Which samples of a step's global batch this rank's share of micro-batch ``number`` holds."""
    size = batch_size // num_micro_batches
    share = share_of_batch(size, ranks)
    return range(number * size + share.start, number * size + share.stop)


def training_batches(
    samples: Sequence[Sample],
    config: DataConfig,
    transform: Transform,
    batch_size: int,
    seed: int,
    start_batch: int,
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
    stored: StoredCrops | None = None,
) -> Iterator[Batch]:
    """Endless batches from batch number ``start_batch`` on: this rank's share of each.

    Args:
        samples: the listing of ``config.train``.
        config: crops, and how many processes decode.
        transform: crop and flip.
        batch_size: images of a batch, over all ranks.
        seed: of order and augmentation.
        start_batch: the first batch's number.
        ranks: by default this process sees whole batches.
        stored: what the batches' states are read from; needs ``config.crops_per_image``.

    Raises:
        DataError: no image can be decoded.
    """
    loader = DataLoader(
        PositionedDataset(samples, transform, seed, config.crops_per_image, stored),
        batch_size=batch_size // ranks.size,
        sampler=PositionSampler(start_batch * batch_size, batch_size, ranks),
        num_workers=config.num_workers,
        collate_fn=_collate,
        pin_memory=torch.cuda.is_available(),
        prefetch_factor=4 if config.num_workers else None,
        worker_init_fn=ignore_signals,
    )
    return iterate(loader)


def evaluation_batches(
    samples: Sequence[Sample], side: int, batch_size: int
) -> Iterator[tuple[list[Sample], Batch]]:
    """Each listed image once, centre-cropped; broken ones are left out and counted."""
    for start in range(0, len(samples), batch_size):
        kept, items = [], []
        chunk = samples[start : start + batch_size]
        for sample in chunk:
            try:
                image = fit_picture(decode_image(sample.read()), side)
            except (DataError, OSError) as exc:
                logger.warning("skipped %s in %s: %s", sample.key, sample.file, exc)
                continue
            kept.append(sample)
            items.append((to_byte_tensor(image), -1 if sample.label is None else sample.label, 0, None))
        if items:
            batch = _collate(items)
            yield kept, Batch(batch.images, batch.labels, len(chunk) - len(kept))


def _collate(items: Sequence[Item]) -> Batch:
    images, labels, num_broken, states = zip(*items, strict=True)
    stored = [state for state in states if state is not None]
    return Batch(
        torch.stack(images), torch.tensor(labels), sum(num_broken), torch.stack(stored) if stored else None
    )
