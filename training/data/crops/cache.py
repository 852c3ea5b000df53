"""Every crop, and what the frozen parts give for it, kept on disk: latents, or the states that phase 2 fuses.

Training from a cache decodes no image and runs no frozen encoder.

A cache is a folder as `training.latents` has them: a manifest, and files of some 256 MiB that are mapped
into memory and read an entry at a time. Tensors of a file, for n images of K crops: ``pixels``
[n*K, 3, S, S] uint8, ``states`` [n*K, L, N, C], ``is_valid`` [n*K] uint8 (0 for an image that could not be
read), and ``crc32`` [n*K] of pixels and states.

Shape legend: K crops an image, L layers (1 for latents), N tokens, C width, S side of a crop.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor

from model.config import TokenizerConfig
from training.data.batches import StoredCrop
from training.data.sources import Sample, expand_path
from training.errors import LatentsError, RecipeError
from training.latents.jobs import JobOf
from training.latents.manifest import BaseIdentity, DtypeName, ManifestOf
from training.latents.planning import cut_units, input_record, unit_image
from training.latents.shards import ShardInfoOf, read_info
from training.latents.store import FolderStore
from training.recipes.recipe import DataConfig, PhaseRecipe

CacheKind = Literal["base", "hidden", "enriched"]
INPUT = "data.train"
"""Name of the listing in the manifest."""
SHARD_BYTES = 256 * 2**20
# Phase 1 decodes z_base, phases 2 and joint fuse hidden states, phase 3 and generators take z_final.
KINDS: dict[str, CacheKind] = {
    "phase1": "base",
    "phase2": "hidden",
    "joint": "hidden",
    "phase3": "enriched",
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class CropIdentity(BaseIdentity):
    """Everything, besides the images, that cached values depend on."""

    kind: CacheKind
    shape: tuple[int, int, int] = Field(description="[L, N, C] of an entry.")
    dtype: DtypeName
    precision: str = Field(description="In which the frozen parts ran.")
    weights_sha256: str = Field(description="Of the frozen parts that made the values.")
    crops_per_image: int = Field(ge=1)
    resize_short_side: tuple[int, int]
    flip: bool
    image_size: int
    seed: int
    images_per_shard: int = Field(ge=1)


class CropManifest(ManifestOf[CropIdentity]):
    """Contents of ``manifest.json`` of a cache."""


class CropInfo(ShardInfoOf[CropIdentity]):
    """Metadata of a cache's file."""


class CropJob(JobOf[CropIdentity]):
    """A cache."""

    manifest_class = CropManifest
    info_class = CropInfo
    setting = "cache.directory"


@dataclass(frozen=True)
class CacheSpec:
    """Which values to keep, where and how."""

    directory: Path
    kind: CacheKind
    shape: tuple[int, int, int]
    dtype: DtypeName
    crops_per_image: int
    image_size: int

    @property
    def entry_bytes(self) -> int:
        """One crop's pixels, values and checksum."""
        num_layers, num_tokens, width = self.shape
        values = num_layers * num_tokens * width * DTYPES[self.dtype].itemsize
        return 3 * self.image_size**2 + values + 9

    def num_bytes(self, num_images: int) -> int:
        """Size of the whole cache, headers aside."""
        return num_images * self.crops_per_image * self.entry_bytes

    @property
    def images_per_shard(self) -> int:
        return max(1, SHARD_BYTES // (self.crops_per_image * self.entry_bytes))

    def existing_bytes(self) -> int:
        """Size of the shards that are there."""
        if not self.directory.is_dir():
            return 0
        return sum(file.stat().st_size for file in self.directory.glob("latents-*.safetensors"))


def cache_spec(phase: str, recipe: PhaseRecipe, config: TokenizerConfig) -> CacheSpec:
    """The cache that a recipe asks for.

    Raises:
        RecipeError: nothing can be cached: crops are random, or the encoder is trained.
    """
    assert recipe.cache is not None
    if recipe.data.crops_per_image is None:
        raise RecipeError("field 'data.crops_per_image': a cache needs fixed crops; say how many an image")
    if recipe.train_encoder:
        raise RecipeError("field 'cache': train_encoder changes what would be cached")
    kind = KINDS[phase]
    num_layers = len(config.fused_layers) if kind == "hidden" else 1
    shape = (num_layers, config.encoder.grid**2, config.encoder.width)
    directory = expand_path(recipe.cache.directory)
    return CacheSpec(
        directory, kind, shape, recipe.cache.dtype, recipe.data.crops_per_image, config.image_size
    )


def cache_job(
    spec: CacheSpec,
    weights_sha256: str,
    samples: Sequence[Sample],
    data: DataConfig,
    seed: int,
    precision: str,
) -> CropJob:
    """The cache of these images by these weights, and its units."""
    identity = CropIdentity(
        kind=spec.kind,
        shape=spec.shape,
        dtype=spec.dtype,
        precision=precision,
        weights_sha256=weights_sha256,
        crops_per_image=spec.crops_per_image,
        resize_short_side=data.resize_short_side,
        flip=data.flip,
        image_size=spec.image_size,
        seed=seed,
        images_per_shard=spec.images_per_shard,
    )
    images = [unit_image(sample) for sample in samples]
    units = cut_units(INPUT, images, spec.images_per_shard)
    return CropJob(FolderStore(spec.directory), identity, units, (input_record(INPUT, images),))


class StateCache:
    """Reads entries of a complete cache. Workers may share it."""

    def __init__(self, directory: Path, manifest: ManifestOf[CropIdentity]) -> None:
        self.directory = directory
        self.manifest = manifest
        self._files: dict[int, Any] = {}

    def read(self, index: int, variant: int) -> StoredCrop | None:
        """One crop, or None of an image that could not be decoded when the cache was made.

        Args:
            index: of the image, in the listing.
            variant: of its crops, from 0.

        Raises:
            LatentsError: the file is missing or damaged.
        """
        identity = self.manifest.identity
        number, offset = divmod(index, identity.images_per_shard)
        path = self.directory / self.manifest.shards[number].name
        if number not in self._files:
            self._files[number] = _open(path, self.manifest)
        file = self._files[number]
        entry = offset * identity.crops_per_image + variant
        if not int(file.get_slice("is_valid")[entry : entry + 1]):
            return None
        pixels, states = (file.get_slice(name)[entry : entry + 1][0] for name in ("pixels", "states"))
        if checksum(pixels, states) != int(file.get_slice("crc32")[entry : entry + 1]):
            raise LatentsError(f"{path}: entry {entry} is damaged: delete the file and start again")
        return StoredCrop(pixels, states)

    def __getstate__(self) -> dict[str, Any]:
        """Maps of files do not travel to other processes; they open their own."""
        return {**vars(self), "_files": {}}


def _open(path: Path, manifest: ManifestOf[CropIdentity]) -> Any:
    """A file, mapped into memory.

    Raises:
        LatentsError: it is missing, truncated, or another cache's.
    """
    if read_info(FolderStore(path.parent), path.name, CropInfo).identity != manifest.identity:
        raise LatentsError(f"{path}: not of this cache: delete it and start again")
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as exc:
        raise LatentsError(f"{path}: missing or damaged ({exc}): delete it and start again") from exc


def checksum(*tensors: Tensor) -> int:
    """CRC-32 of the bytes of tensors, one after another."""
    found = 0
    for tensor in tensors:
        found = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().tobytes(), found)
    return found
