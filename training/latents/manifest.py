"""``manifest.json``: what a folder of latents was made from, and which files it has.

A folder holds ``manifest.json``, ``latents-000000.safetensors`` and so on, and ``statistics.safetensors``.
`training.latents.shards` describes the files.
"""

from collections.abc import Sequence
from typing import Any, Generic, Literal, Self, TypeVar

import torch
from pydantic import Field, ValidationError

from model.config import FrozenConfig
from model.images.files import Fit
from model.tokenizer import LatentKind
from training.errors import LatentsError
from training.latents.store import Store

FORMAT = "drorae-latents"
VERSION = 1
MANIFEST_FILE = "manifest.json"
STATISTICS_FILE = "statistics.safetensors"
DtypeName = Literal["float16", "bfloat16", "float32"]


class BaseIdentity(FrozenConfig):
    """What files depend on, besides the images: of every kind of folder a class of its own."""

    def differences(self, other: Self) -> list[str]:
        """What ``other`` has otherwise, as phrases such as ``dtype is float16, not float32``."""
        mine, others = self.model_dump(), other.model_dump()
        return [
            f"{name} is {_short(mine[name])}, not {_short(others[name])}"
            for name in mine
            if mine[name] != others[name]
        ]


class Identity(BaseIdentity):
    """Everything, besides the images, that latents depend on."""

    model: str = Field(description="Name of the tokenizer.")
    checkpoint_sha256: str = Field(description="Of the checkpoint, as `drorae info` shows it.")
    latent: LatentKind = Field(description="Fused over the layers, or the encoder's last layer.")
    normalized: bool = Field(description="Whether normalised per position by the checkpoint's statistics.")
    dtype: DtypeName = Field(description="Of the stored numbers.")
    shape: tuple[int, int, int] = Field(description="[C, h, w] of one latent.")
    flip: bool = Field(description="Whether latents of the mirror images are there as well.")
    fit: Fit = Field(description="How an image becomes square.")
    image_size: int = Field(ge=1, description="Side of the square, pixels.")
    precision: DtypeName = Field(description="In which the tokenizer ran.")
    batch_size: int = Field(ge=1, description="Images the tokenizer ran on at once.")
    images_per_shard: int = Field(ge=1, description="Most images of a file.")

    @property
    def torch_dtype(self) -> torch.dtype:
        """Type of the stored numbers."""
        return getattr(torch, self.dtype)

    @property
    def image_bytes(self) -> int:
        """Bytes of the numbers of one image, its mirror image included."""
        channels, rows, columns = self.shape
        return (1 + self.flip) * channels * rows * columns * self.torch_dtype.itemsize


Kind = TypeVar("Kind", bound=BaseIdentity)


class InputRecord(FrozenConfig):
    """One folder, tar or list file that was read."""

    name: str
    images: int = Field(ge=0, description="Listed images, broken ones included.")
    num_bytes: int = Field(ge=0, description="Of these images' files together.")
    sha256: str = Field(description="Of the images' names and labels, in their order.")


class ShardRecord(FrozenConfig):
    """One file of latents."""

    name: str
    n: int = Field(ge=0, description="Rows: images that could be read.")
    bytes: int = Field(ge=0)
    sha256: str
    broken: int = Field(0, ge=0, description="Images that could not be read; the file names them.")


class Totals(FrozenConfig):
    """Sums over the table of files."""

    images: int = 0
    broken: int = 0
    bytes: int = 0


class ManifestOf(FrozenConfig, Generic[Kind]):
    """Contents of ``manifest.json``, by the kind of identity."""

    format: Literal["drorae-latents"] = "drorae-latents"
    version: Literal[1] = 1
    identity: Kind
    inputs: tuple[InputRecord, ...]
    classes: tuple[str, ...] = Field(description="Names by label; empty if nothing names them.")
    complete: bool = Field(description="Whether every file is there.")
    totals: Totals = Totals()
    shards: tuple[ShardRecord, ...] = ()

    def with_shards(self, shards: Sequence[ShardRecord], complete: bool) -> Self:
        """This manifest with another table."""
        totals = Totals(
            images=sum(shard.n for shard in shards),
            broken=sum(shard.broken for shard in shards),
            bytes=sum(shard.bytes for shard in shards),
        )
        return self.model_copy(update={"shards": tuple(shards), "totals": totals, "complete": complete})


class Manifest(ManifestOf[Identity]):
    """Contents of ``manifest.json`` of a folder of latents."""


AnyManifest = TypeVar("AnyManifest", bound=ManifestOf[Any])


def read_manifest(store: Store) -> Manifest | None:
    """The manifest of a folder of latents; None where there is none.

    Raises:
        LatentsError: it cannot be read, or is of something else.
    """
    return read_manifest_of(store, Manifest)


def read_manifest_of(store: Store, kind: type[AnyManifest]) -> AnyManifest | None:
    """A folder's manifest, of any kind; None where there is none.

    Raises:
        LatentsError: as `read_manifest`.
    """
    data = store.read(MANIFEST_FILE)
    if data is None:
        return None
    try:
        return kind.model_validate_json(data)
    except ValidationError as exc:
        error = exc.errors()[0]
        field = ".".join(str(step) for step in error["loc"]) or "(root)"
        raise LatentsError(
            f"{store.path(MANIFEST_FILE)}: no manifest of latents: field {field!r}: {error['msg']}"
        ) from exc


def write_manifest(store: Store, manifest: ManifestOf[Any]) -> None:
    """Write a folder's manifest, whole or not at all.

    Raises:
        OSError: as `Store.write`.
    """
    store.write(MANIFEST_FILE, (manifest.model_dump_json(indent=1) + "\n").encode())


def _short(value: object) -> str:
    text = str(value)
    return f"{text[:12]}..." if len(text) == 64 else text
