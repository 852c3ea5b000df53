"""Fills a cache of latents or hidden states, shard by shard; a killed build goes on where it was.

Shape legend: B batch, K crops an image, L layers (1 for latents), N tokens, C width.
"""

import errno
import hashlib
import json
import logging
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from model.images.tensors import to_byte_tensor
from model.tokenizer import Tokenizer
from training.data.batches import decode_image, fixed_crop, random_crop
from training.data.cache import (
    DTYPES,
    MANIFEST_FILE,
    CacheKind,
    CacheManifest,
    CacheSpec,
    StateCache,
    check_manifest,
    checksum,
    is_whole_shard,
    make_key,
    read_manifest,
    shard_file,
    shard_images,
)
from training.data.shards import write_shard
from training.data.sources import Sample
from training.data.workers import ignore_signals, iterate
from training.distributed.device import autocast
from training.distributed.ranks import Ranks
from training.errors import CacheError, DataError
from training.output.files import write_atomically
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
        CacheError: the folder holds another cache, there is no room, or a value exceeds the dtype.
    """
    key = make_key(
        spec,
        _weights_sha256(tokenizer, frozen_sha256, spec.kind),
        samples,
        data,
        seed,
        _resolved(precision, tokenizer.device),
    )
    # The main rank looks, and says what is missing: while the others look, it may already be filling.
    manifest = CacheManifest(key=key, images_per_shard=spec.images_per_shard)
    missing: list[int] = []
    if ranks.is_main:
        manifest, missing = _prepare(spec, manifest)
    manifest, missing = ranks.broadcast_object((manifest, missing))
    if missing:
        crops = CropDataset(samples, data, tokenizer.config.image_size, seed, spec.crops_per_image)
        _fill(tokenizer, spec, manifest, missing, crops, precision, ranks)
    ranks.barrier()
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


class CropDataset(Dataset[tuple[Tensor, bool]]):
    """Every crop of every image, by entry: [3, S, S] uint8, and whether the image could be decoded."""

    def __init__(
        self, samples: Sequence[Sample], data: DataConfig, side: int, seed: int, crops_per_image: int
    ) -> None:
        self.samples = samples
        self.transform = random_crop(data, side)
        self.side = side
        self.seed = seed
        self.crops_per_image = crops_per_image
        self.num_workers = data.num_workers

    def __getitem__(self, entry: int) -> tuple[Tensor, bool]:
        index, variant = divmod(entry, self.crops_per_image)
        sample = self.samples[index]
        try:
            image = decode_image(sample.read())
        except (DataError, OSError) as exc:
            logger.warning("not cached: %s in %s: %s", sample.key, sample.file, exc)
            return torch.zeros(3, self.side, self.side, dtype=torch.uint8), False
        return to_byte_tensor(fixed_crop(image, self.transform, self.seed, index, variant)), True


def _prepare(spec: CacheSpec, wanted: CacheManifest) -> tuple[CacheManifest, list[int]]:
    """The folder's manifest, made where there is none, and the shards that are missing and have room."""
    manifest = read_manifest(spec.directory) or wanted
    check_manifest(spec.directory, manifest, wanted.key)
    missing = [n for n in range(manifest.num_shards) if not is_whole_shard(spec.directory, manifest, n)]
    if not missing:
        return manifest, missing
    num_images = sum(len(shard_images(manifest, number)) for number in missing)
    directory = spec.directory
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise CacheError(f"field 'cache.directory': {directory} cannot be made: {exc.strerror}") from exc
    needed, free = spec.num_bytes(num_images), shutil.disk_usage(directory).free
    if needed > free:
        raise CacheError(
            f"field 'cache.directory': {directory} has {free / 2**30:,.1f} GiB free and the cache needs "
            f"{needed / 2**30:,.1f} more ({num_images} images x {spec.crops_per_image} crops x "
            f"{spec.entry_bytes / 2**20:.2f} MiB): use fewer crops, a smaller dtype or another folder"
        )
    if not (directory / MANIFEST_FILE).exists():
        with _saying_what_is_full(directory):
            write_atomically(directory / MANIFEST_FILE, manifest.model_dump_json(indent=2) + "\n")
    return manifest, missing


def _fill(
    tokenizer: Tokenizer,
    spec: CacheSpec,
    manifest: CacheManifest,
    missing: Sequence[int],
    crops: CropDataset,
    precision: str,
    ranks: Ranks,
) -> None:
    """Fill this rank's share of the missing shards."""
    numbers = ranks.shard(missing)
    total = sum(len(shard_images(manifest, number)) for number in numbers) * spec.crops_per_image
    logger.info("caching %d crops under %s", total, spec.directory)
    with tqdm(
        total=total, desc=f"cache {spec.kind}", unit="crop", dynamic_ncols=True, disable=not ranks.is_main
    ) as bar:
        for number in numbers:
            tensors = _encode(tokenizer, spec, shard_images(manifest, number), crops, precision, bar)
            file = shard_file(spec.directory, number)
            with _saying_what_is_full(spec.directory):
                write_shard(file, tensors, {"key": manifest.digest})


@torch.no_grad()
def _encode(
    tokenizer: Tokenizer,
    spec: CacheSpec,
    images: range,
    crops: CropDataset,
    precision: str,
    bar: "tqdm[Any]",
) -> dict[str, Tensor]:
    """One shard's tensors."""
    count = spec.crops_per_image
    entries = range(images.start * count, images.stop * count)
    crop_shape = (3, spec.image_size, spec.image_size)
    stored = torch.zeros(len(entries), *crop_shape, dtype=torch.uint8)
    states = torch.zeros(len(entries), *spec.shape, dtype=DTYPES[spec.dtype])
    is_valid = torch.zeros(len(entries), dtype=torch.uint8)
    loader = DataLoader(
        crops,
        batch_size=BATCH_SIZE,
        sampler=entries,
        num_workers=crops.num_workers,
        worker_init_fn=ignore_signals,
    )
    done = 0
    for pixels, valid in iterate(loader):
        with autocast(tokenizer.device, precision):
            found = frozen_states(tokenizer, spec.kind, pixels.to(tokenizer.device).float() / 255)
        place = slice(done, done + len(pixels))
        states[place] = found.to(states.dtype).cpu()
        stored[place] = pixels
        is_valid[place] = valid
        if not torch.isfinite(states[place][valid]).all():
            raise CacheError(f"field 'cache.dtype': {spec.dtype} does not hold these values; use bfloat16")
        done += len(pixels)
        bar.update(len(pixels))
    sums = [checksum(*entry) for entry in zip(stored, states, strict=True)]
    return {
        "pixels": stored,
        "states": states,
        "crc32": torch.tensor(sums, dtype=torch.int64),
        "is_valid": is_valid,
    }


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


@contextmanager
def _saying_what_is_full(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as exc:
        if exc.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise CacheError(
            f"no space left under {directory}; its shards are whole: free some and start again"
        ) from exc
