"""A complete folder of latents, opened for reading.

Rows are numbered through all files, in their order. With mirror images a row has two views: number r is the
image, and r plus the number of rows its mirror image.

Shape legend: B batch, R rows of a file, F views, C latent channels, h w latent grid.
"""

import bisect
import hashlib
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from training.errors import LatentsError
from training.latents.manifest import MANIFEST_FILE, Manifest, read_manifest
from training.latents.shards import Header, read_header, read_statistics, read_tensors
from training.latents.store import FolderStore, Store

VIEWS = ("latents", "latents_flip")
_AGAIN = "give the command that made it once more"
OPEN_SHARDS = 64  # headers that a process keeps: names and places, some 100 kB each


class LatentRows(NamedTuple):
    """Several rows.

    Attributes:
        latents: [B, C, h, w] in the folder's dtype.
        labels: [B] int64, -1 where the source named no class.
        keys: names of the B images.
    """

    latents: Tensor
    labels: Tensor
    keys: list[str]


class _Shard(NamedTuple):
    name: str
    header: Header
    labels: list[int]


class LatentFolder:
    """Random access to the rows of a folder. Pickles, so that DataLoader's workers may have it.

    Args:
        directory: of ``drorae tokenize``.
        checkpoint_sha256: the tokenizer whose latents are expected; None for any.

    Raises:
        LatentsError: the folder is no such folder, is incomplete, lacks a file or has a cut one, or holds
            the latents of another tokenizer.
    """

    def __init__(self, directory: str | Path, checkpoint_sha256: str | None = None) -> None:
        self.directory = Path(directory)
        self.store: Store = FolderStore(self.directory)
        self.manifest = _complete_manifest(self.store)
        self.identity = self.manifest.identity
        found = self.identity.checkpoint_sha256
        if checkpoint_sha256 not in (None, found):
            raise LatentsError(
                f"{directory}: latents of another tokenizer, {self.identity.model} ({found[:12]}...), "
                f"and {checkpoint_sha256[:12]}... is wanted"
            )
        ends = list(accumulate(shard.n for shard in self.manifest.shards))
        self.shard_ranges = [
            range(end - shard.n, end) for shard, end in zip(self.manifest.shards, ends, strict=True)
        ]
        self._ends = ends
        self._open = lru_cache(OPEN_SHARDS)(self._open_shard)

    def __len__(self) -> int:
        """Rows: images, mirror images not counted."""
        return self.manifest.totals.images

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != "_open"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        self._open = lru_cache(OPEN_SHARDS)(self._open_shard)

    @property
    def digest(self) -> str:
        """SHA-256 of the manifest, which lists the checksums of all files."""
        return hashlib.sha256(self.store.read(MANIFEST_FILE) or b"").hexdigest()

    def num_views(self, flips: bool) -> int:
        """2 with mirror images, else 1.

        Raises:
            LatentsError: the folder has none.
        """
        if flips and not self.identity.flip:
            raise LatentsError(f"{self.directory}: no mirror images: make it with drorae tokenize --flip")
        return 2 if flips else 1

    def rows(self, numbers: Sequence[int]) -> LatentRows:
        """Rows by number, or their views.

        Raises:
            IndexError: there is no such row or view.
            LatentsError: a file is damaged.
        """
        latents = torch.empty(len(numbers), *self.identity.shape, dtype=self.identity.torch_dtype)
        places = latents.view(torch.uint8).flatten(1).numpy()
        labels, keys = [], []
        for place, number in zip(places, numbers, strict=True):
            view, row = divmod(number, len(self))
            if not 0 <= view <= self.identity.flip:
                raise IndexError(f"{self.directory}: row {number} of {len(self)}")
            number_of_shard = bisect.bisect_right(self._ends, row)
            shard, offset = self._open(number_of_shard), row - self.shard_ranges[number_of_shard].start
            place[:] = np.frombuffer(self._read(shard, VIEWS[view], offset, len(place)), np.uint8)
            labels.append(shard.labels[offset])
            keys.append(shard.header.info.keys[offset])
        return LatentRows(latents, torch.tensor(labels), keys)

    def shard_views(self, shard: int) -> Tensor:
        """Everything of one file, [R, F, C, h, w].

        Raises:
            LatentsError: it is damaged.
        """
        names = VIEWS[: 1 + self.identity.flip]
        found = read_tensors(self.store, self._open(shard).name, names)
        return torch.stack([found[name] for name in names], dim=1)

    def shard_keys(self, shard: int) -> Sequence[str]:
        """Names of a file's rows."""
        return self._open(shard).header.info.keys

    def shard_labels(self, shard: int) -> list[int]:
        """Labels of a file's rows, -1 for none."""
        return self._open(shard).labels

    def labels(self) -> list[int]:
        """Labels of all rows, -1 for none."""
        return [label for shard in range(len(self._ends)) for label in self.shard_labels(shard)]

    def find(self, key: str) -> list[int]:
        """Rows of this name; reads every file's header.

        Names are unique within an input: a folder, a tar or a list.
        """
        return [
            row
            for shard, rows in enumerate(self.shard_ranges)
            for row, name in zip(rows, self.shard_keys(shard), strict=True)
            if name == key
        ]

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Mean and biased variance per position over all rows and views, each [C, h, w] float32.

        Raises:
            LatentsError: the file of statistics is missing or damaged.
        """
        return read_statistics(self.store)

    def _open_shard(self, shard: int) -> _Shard:
        name = self.manifest.shards[shard].name
        header = read_header(self.store, name)
        if header.info.identity != self.identity:
            raise LatentsError(f"{self.store.path(name)}: of another folder: {_AGAIN}, with --verify")
        return _Shard(name, header, read_tensors(self.store, name, ["labels"])["labels"].tolist())

    def _read(self, shard: _Shard, view: str, offset: int, num_bytes: int) -> bytes:
        """The bytes of one row."""
        start = shard.header.places[view].start + offset * num_bytes
        data = self.store.read(shard.name, start, start + num_bytes) or b""
        if len(data) != num_bytes:
            raise LatentsError(f"{self.store.path(shard.name)}: cut off while it was read")
        return data


def _complete_manifest(store: Store) -> Manifest:
    manifest = read_manifest(store)
    if manifest is None:
        raise LatentsError(f"{store.path(MANIFEST_FILE)}: there is none, so this is no folder of latents")
    if not manifest.complete:
        raise LatentsError(f"{store.path(MANIFEST_FILE)}: the folder is incomplete: {_AGAIN}")
    for record in manifest.shards:
        size = store.size(record.name)
        if size != record.bytes:
            state = "missing" if size is None else f"cut off or changed ({size} bytes, not {record.bytes})"
            raise LatentsError(f"{store.path(record.name)}: {state}: {_AGAIN}, with --verify")
    return manifest
