"""Fills a cache of latents or hidden states, file by file; a killed build goes on where it was.

Shape legend: B batch, K crops an image, L layers (1 for latents), N tokens, C width.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from model.images.tensors import to_byte_tensor
from model.tokenizer import Tokenizer
from training.data.batches import decode_image, fixed_crop, random_crop
from training.data.crops.cache import (
    DTYPES,
    CacheKind,
    CacheSpec,
    CropInfo,
    CropJob,
    StateCache,
    cache_job,
    checksum,
)
from training.data.sources import Sample
from training.data.workers import ignore_signals, iterate
from training.distributed.device import autocast
from training.distributed.ranks import Ranks
from training.errors import DataError, LatentsError
from training.latents.jobs import complete_job, explaining_a_full_disk, open_job, start_job
from training.latents.shards import BrokenImage, write_shard
from training.latents.units import Unit
from training.recipes.recipe import DataConfig

logger = logging.getLogger(__name__)

BATCH_SIZE = 32


def open_or_build_cache(
    tokenizer: Tokenizer,
    frozen_sha256: Mapping[str, str],
    spec: CacheSpec,
    samples: Sequence[Sample],
    data: DataConfig,
    seed: int,
    precision: str,
    ranks: Ranks = Ranks(),  # noqa: B008 - frozen
) -> StateCache:
    """The cache of a data set by a tokenizer's frozen parts; what of it is missing is computed.

    Of several ranks each fills its share of the shards, on a disk that all of them see.

    Args:
        tokenizer: on its device; its encoder, and for ``enriched`` its fusion, are frozen.
        frozen_sha256: digests of its frozen parts, by name.
        spec: which values, where and how.
        samples: the listing of ``data.train``.
        data: the crops.
        seed: of the crops.
        precision: of a recipe, in which the frozen parts run.
        ranks: those that share the work.

    Raises:
        LatentsError: the folder holds another cache, there is no room, or a value exceeds the dtype.
        OSError: a file cannot be written.
    """
    weights_sha256 = _weights_sha256(tokenizer, frozen_sha256, spec.kind)
    job = cache_job(spec, weights_sha256, samples, data, seed, _resolved(precision, tokenizer.device))
    # The main rank looks, and says what is missing: while the others look, it may already be filling.
    missing = ranks.on_main(lambda: _prepare(spec, job))
    if missing:
        crops = CropDataset(samples, data, tokenizer.config.image_size, seed, spec.crops_per_image)
        with explaining_a_full_disk():
            _fill(tokenizer, spec, job, missing, crops, precision, ranks)
    ranks.barrier()
    manifest = ranks.on_main(lambda: complete_job(job, open_job(job)))
    assert manifest is not None, "every rank has filled its share"
    return StateCache(spec.directory, manifest)


def frozen_states(tokenizer: Tokenizer, kind: CacheKind, images: Tensor) -> Tensor:
    """States [B, L, N, C] to cache of images [B, 3, S, S] in [0, 1]."""
    if kind == "hidden":
        num_layers = len(tokenizer.config.fused_layers)
        return torch.stack(tokenizer.encoder(tokenizer.preprocess(images))[-num_layers:], dim=1)
    return tokenizer.tokens(images, "base" if kind == "base" else "enriched")[:, None]


def tokens_from_states(tokenizer: Tokenizer, kind: CacheKind, states: Tensor) -> Tensor:
    """Latent tokens [B, N, C] of what `frozen_states` gave, on the tokenizer's device."""
    states = states.to(tokenizer.device, non_blocking=True).float()
    if kind != "hidden":
        return states[:, 0]
    assert tokenizer.fusion is not None
    return tokenizer.fusion(list(states.unbind(dim=1)))


class CropDataset(Dataset[tuple[Tensor, str]]):
    """Every crop of every image, by entry: [3, S, S] uint8, and why the image could not be decoded, or ""."""

    def __init__(
        self, samples: Sequence[Sample], data: DataConfig, side: int, seed: int, crops_per_image: int
    ) -> None:
        self.samples = samples
        self.transform = random_crop(data, side)
        self.side = side
        self.seed = seed
        self.crops_per_image = crops_per_image
        self.num_workers = data.num_workers

    def __getitem__(self, entry: int) -> tuple[Tensor, str]:
        index, variant = divmod(entry, self.crops_per_image)
        sample = self.samples[index]
        try:
            image = decode_image(sample.read())
        except (DataError, OSError) as exc:
            logger.warning("not cached: %s in %s: %s", sample.key, sample.file, exc)
            return torch.zeros(3, self.side, self.side, dtype=torch.uint8), str(exc) or type(exc).__name__
        return to_byte_tensor(fixed_crop(image, self.transform, self.seed, index, variant)), ""


def _prepare(spec: CacheSpec, job: CropJob) -> list[Unit]:
    """The units that are missing and have room."""
    finished = open_job(job)
    missing = [unit for unit in job.units if unit.file_name not in finished]
    if not missing:
        return missing
    num_images = sum(len(unit) for unit in missing)
    needed, free = spec.num_bytes(num_images), job.store.free_bytes()
    if free is not None and needed > free:
        raise LatentsError(
            f"field 'cache.directory': {spec.directory} has {free / 2**30:,.1f} GiB free and the cache needs "
            f"{needed / 2**30:,.1f} more ({num_images} images x {spec.crops_per_image} crops x "
            f"{spec.entry_bytes / 2**20:.2f} MiB): use fewer crops, a smaller dtype or another folder"
        )
    job.store.remove_remains()
    start_job(job, finished)
    return missing


def _fill(
    tokenizer: Tokenizer,
    spec: CacheSpec,
    job: CropJob,
    missing: Sequence[Unit],
    crops: CropDataset,
    precision: str,
    ranks: Ranks,
) -> None:
    """Fill this rank's share of the missing files."""
    mine = ranks.shard(missing)
    total = sum(len(unit) for unit in mine) * spec.crops_per_image
    logger.info("caching %d crops under %s", total, spec.directory)
    with tqdm(
        total=total, desc=f"cache {spec.kind}", unit="crop", dynamic_ncols=True, disable=not ranks.is_main
    ) as bar:
        for unit in mine:
            tensors, broken = _encode(tokenizer, spec, unit, crops, precision, bar)
            info = CropInfo(
                identity=job.identity,
                input=unit.input,
                start=unit.start,
                keys=tuple(key for index, key in enumerate(unit.keys) if index not in broken),
                broken=tuple(
                    BrokenImage(position=unit.start + index, key=unit.keys[index], reason=reason)
                    for index, reason in broken.items()
                ),
            )
            write_shard(job.store, unit.file_name, info, tensors)


@torch.no_grad()
def _encode(
    tokenizer: Tokenizer,
    spec: CacheSpec,
    unit: Unit,
    crops: CropDataset,
    precision: str,
    bar: "tqdm[Any]",
) -> tuple[dict[str, Tensor], dict[int, str]]:
    """One file's tensors, and why images of it could not be read, by their index in the unit."""
    count = spec.crops_per_image
    entries = range(unit.start * count, (unit.start + len(unit)) * count)
    stored = torch.zeros(len(entries), 3, spec.image_size, spec.image_size, dtype=torch.uint8)
    states = torch.zeros(len(entries), *spec.shape, dtype=DTYPES[spec.dtype])
    reasons: list[str] = []
    loader = DataLoader(
        crops,
        batch_size=BATCH_SIZE,
        sampler=entries,
        num_workers=crops.num_workers,
        worker_init_fn=ignore_signals,
    )
    for pixels, why in iterate(loader):
        with autocast(tokenizer.device, precision):
            found = frozen_states(tokenizer, spec.kind, pixels.to(tokenizer.device).float() / 255)
        place = slice(len(reasons), len(reasons) + len(pixels))
        states[place] = found.to(states.dtype).cpu()
        stored[place] = pixels
        if not torch.isfinite(states[place][[not reason for reason in why]]).all():
            raise LatentsError(f"field 'cache.dtype': {spec.dtype} does not hold these values; use bfloat16")
        reasons += why
        bar.update(len(pixels))
    sums = [checksum(*entry) for entry in zip(stored, states, strict=True)]
    tensors = {
        "pixels": stored,
        "states": states,
        "crc32": torch.tensor(sums, dtype=torch.int64),
        "is_valid": torch.tensor([not reason for reason in reasons], dtype=torch.uint8),
    }
    return tensors, {entry // count: reason for entry, reason in enumerate(reasons) if reason}


def _weights_sha256(tokenizer: Tokenizer, frozen_sha256: Mapping[str, str], kind: CacheKind) -> str:
    """Digest of the frozen parts that make the values, and of the fusion's configuration."""
    config = tokenizer.config
    parts: dict[str, object] = {
        "encoder": frozen_sha256["encoder"],
        "config": config.encoder.model_dump(mode="json"),
        "pixels": [config.pixel_mean, config.pixel_std],
    }
    if kind == "enriched" and config.fusion is not None:
        parts |= {"fusion": frozen_sha256["fusion"], "fusion_config": config.fusion.model_dump(mode="json")}
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _resolved(precision: str, device: torch.device) -> str:
    """Precision that ``auto`` means on this device."""
    if precision != "auto":
        return precision
    return "bfloat16" if device.type == "cuda" else "float32"
