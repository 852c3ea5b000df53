"""Every crop, and what the frozen parts give for it, kept on disk: latents, or the states that phase 2 fuses.

Training from a cache decodes no image and runs no frozen encoder.

A folder holds ``cache.json``, which says what the values were made from, and safetensors shards of some
256 MiB that are mapped into memory and read an entry at a time. An entry carries a checksum; a cache of
other weights, images or crops is refused.

Shape legend: K crops an image, L layers (1 for latents), N tokens, C width, S side of a crop.
"""

import hashlib
import logging
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, ValidationError
from safetensors import SafetensorError
from torch import Tensor

from model.config import FrozenConfig, TokenizerConfig
from training.data import shards
from training.data.batches import StoredCrop
from training.data.sources import Sample, expand_path
from training.errors import CacheError, DataError, RecipeError
from training.recipes.recipe import DataConfig, PhaseRecipe

logger = logging.getLogger(__name__)

CacheKind = Literal["base", "hidden", "enriched"]
FORMAT = "drorae-cache"
MANIFEST_FILE = "cache.json"
SHARD_BYTES = 256 * 2**20
# Phase 1 decodes z_base, phases 2 and joint fuse hidden states, phase 3 and generators take z_final.
KINDS: dict[str, CacheKind] = {
    "phase1": "base",
    "phase2": "hidden",
    "joint": "hidden",
    "phase3": "enriched",
}
DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class CacheKey(FrozenConfig):
    """Everything that cached values depend on. Two caches of one key hold the same values."""

    kind: CacheKind
    shape: tuple[int, int, int] = Field(description="[L, N, C] of an entry.")
    dtype: Literal["float16", "bfloat16", "float32"]
    precision: str = Field(description="In which the frozen parts ran.")
    weights_sha256: str = Field(description="Of the frozen parts that made the values.")
    listing_sha256: str = Field(description="Of the images' names and sizes, in their order.")
    num_images: int = Field(ge=1)
    crops_per_image: int = Field(ge=1)
    resize_short_side: tuple[int, int]
    flip: bool
    image_size: int
    seed: int


class CacheManifest(FrozenConfig):
    """Contents of ``cache.json``."""

    format: Literal["drorae-cache"] = "drorae-cache"
    version: Literal[2] = 2
    key: CacheKey
    images_per_shard: int = Field(ge=1)

    @property
    def num_shards(self) -> int:
        return -(-self.key.num_images // self.images_per_shard)

    @property
    def digest(self) -> str:
        """SHA-256 of the key; every shard carries it."""
        return hashlib.sha256(self.key.model_dump_json().encode()).hexdigest()


@dataclass(frozen=True)
class CacheSpec:
    """Which values to keep, where and how."""

    directory: Path
    kind: CacheKind
    shape: tuple[int, int, int]
    dtype: Literal["float16", "bfloat16", "float32"]
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
        return sum(file.stat().st_size for file in self.directory.glob("shard-*.safetensors"))


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


def make_key(
    spec: CacheSpec,
    weights_sha256: str,
    samples: Sequence[Sample],
    data: DataConfig,
    seed: int,
    precision: str,
) -> CacheKey:
    """The key of a cache of these images by these weights.

    Raises:
        OSError: a listed file is gone.
    """
    return CacheKey(
        kind=spec.kind,
        shape=spec.shape,
        dtype=spec.dtype,
        precision=precision,
        weights_sha256=weights_sha256,
        listing_sha256=shards.listing_sha256(samples),
        num_images=len(samples),
        crops_per_image=spec.crops_per_image,
        resize_short_side=data.resize_short_side,
        flip=data.flip,
        image_size=spec.image_size,
        seed=seed,
    )


def read_manifest(directory: Path) -> CacheManifest | None:
    """Read the manifest of a folder's cache; None where there is none.

    Raises:
        CacheError: ``cache.json`` cannot be read, or is of something else.
    """
    file = directory / MANIFEST_FILE
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError) as exc:
        raise CacheError(f"{file}: cannot be read: {exc}") from exc
    try:
        return CacheManifest.model_validate_json(text)
    except ValidationError as exc:
        raise CacheError(f"{file}: no manifest of a cache: delete the folder or name another") from exc


def check_manifest(directory: Path, found: CacheManifest, wanted: CacheKey) -> None:
    """Refuse a cache that was made from something else.

    Raises:
        CacheError: names the folder and what differs.
    """
    before, now = found.key.model_dump(), wanted.model_dump()
    if changed := shards.differing(before, now):
        changes = ", ".join(f"{name} is {_short(before[name])}, not {_short(now[name])}" for name in changed)
        raise CacheError(
            f"{directory} is a cache of something else ({changes}): delete it or name another cache.directory"
        )


def shard_file(directory: Path, number: int) -> Path:
    """The shard of this number."""
    return directory / f"shard-{number:05d}.safetensors"


def is_whole_shard(directory: Path, manifest: CacheManifest, number: int) -> bool:
    """Whether a shard is there and is this cache's; a damaged or foreign one is not."""
    try:
        open_shard(directory, manifest, number)
    except CacheError:
        return False
    return True


def open_shard(directory: Path, manifest: CacheManifest, number: int) -> Any:
    """A shard, mapped into memory.

    Raises:
        CacheError: it is missing, truncated, or another cache's.
    """
    file, key = shard_file(directory, number), manifest.key
    num_entries = len(shard_images(manifest, number)) * key.crops_per_image
    try:
        shard, facts = shards.open_shard(file)
        shape = shard.get_slice("states").get_shape()
    except (DataError, SafetensorError) as exc:
        raise CacheError(f"{file}: missing or damaged ({exc}): delete it and start again") from exc
    if facts.get("key") != manifest.digest or shape != [num_entries, *key.shape]:
        raise CacheError(f"{file}: not of this cache: delete it and start again")
    return shard


def shard_images(manifest: CacheManifest, number: int) -> range:
    """Indices, in the listing, of the images of a shard."""
    first = number * manifest.images_per_shard
    return range(first, min(first + manifest.images_per_shard, manifest.key.num_images))


class StateCache:
    """Reads entries; whole and of the right key when it is made. Workers may share it."""

    def __init__(self, directory: Path, manifest: CacheManifest) -> None:
        self.directory = directory
        self.manifest = manifest
        self._shards: dict[int, Any] = {}

    def read(self, index: int, variant: int) -> StoredCrop | None:
        """One crop, or None of an image that could not be decoded when the cache was made.

        Args:
            index: of the image, in the listing.
            variant: of its crops, from 0.

        Raises:
            CacheError: the shard is missing or damaged.
        """
        number, offset = divmod(index, self.manifest.images_per_shard)
        if number not in self._shards:
            self._shards[number] = open_shard(self.directory, self.manifest, number)
        shard = self._shards[number]
        entry = offset * self.manifest.key.crops_per_image + variant
        file = shard_file(self.directory, number)
        if not int(shard.get_slice("is_valid")[entry : entry + 1]):
            return None
        pixels, states = (shard.get_slice(name)[entry : entry + 1][0] for name in ("pixels", "states"))
        if checksum(pixels, states) != int(shard.get_slice("crc32")[entry : entry + 1]):
            raise CacheError(f"{file}: entry {entry} is damaged: delete the file and start again")
        return StoredCrop(pixels, states)

    def __getstate__(self) -> dict[str, Any]:
        """Maps of files do not travel to other processes; they open their own."""
        return {**vars(self), "_shards": {}}


def checksum(*tensors: Tensor) -> int:
    """CRC-32 of the bytes of tensors, one after another."""
    found = 0
    for tensor in tensors:
        found = zlib.crc32(tensor.contiguous().view(torch.uint8).numpy().tobytes(), found)
    return found


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text
