"""A folder of latents as PyTorch data sets: rows by number, and shuffled batches.

Shape legend: B batch, C latent channels, h w latent grid.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, get_worker_info

from training.errors import LatentsError
from training.latents.reading.folder import LatentFolder, LatentRows

BUFFER_ROWS = 8192


class LatentRow(NamedTuple):
    """One item: a latent [C, h, w], its class or -1, and the name of its image."""

    latent: Tensor
    label: int
    key: str


class LatentDataset(Dataset[LatentRow]):
    """Random access, for samplers and small sets. ``DataLoader`` collates items to a `LatentRow` of batches.

    With ``flips`` there are twice as many items: the second half are the mirror images.

    Args:
        directory: of ``drorae tokenize``, complete.
        flips: whether mirror images are items too; the folder was made with ``--flip``.
        checkpoint_sha256: the tokenizer whose latents are expected; None for any.

    Raises:
        LatentsError: the folder is incomplete, damaged, another tokenizer's, or lacks mirror images.
    """

    def __init__(
        self, directory: str | Path, flips: bool = False, checkpoint_sha256: str | None = None
    ) -> None:
        self.folder = LatentFolder(directory, checkpoint_sha256)
        self.num_views = self.folder.num_views(flips)

    def __len__(self) -> int:
        return len(self.folder) * self.num_views

    def __getitem__(self, index: int) -> LatentRow:
        if not 0 <= index < len(self):
            raise IndexError(f"item {index} of {len(self)}")
        latents, labels, keys = self.folder.rows([index])
        return LatentRow(latents[0], int(labels[0]), keys[0])


class LatentStream(IterableDataset[LatentRows]):
    """Shuffled batches, for ``DataLoader(stream, batch_size=None, num_workers=4)``.

    An epoch visits the shards in random order, and every row leaves its place in that order by less than
    ``buffer_rows``: reading stays local, so a network disk serves it well, and no row is held in memory.
    The order depends on (seed, epoch) alone. Global batch k is a run of ``batch_size * world_size`` rows of
    it, of which each rank takes its part; DataLoader's workers take turns. So the number of workers changes
    nothing, and training that stopped behind batch k goes on with ``start(epoch, k)``. The rows behind the
    last whole global batch are left out of the epoch.

    Args:
        directory: of ``drorae tokenize``, complete.
        batch_size: rows per batch of this rank.
        seed: of the order.
        flips: whether mirror images are rows too; the folder was made with ``--flip``.
        buffer_rows: how far rows are mixed; at least a few shards is a good shuffle.
        rank, world_size: by default those of ``torch.distributed``, where it is initialised.
        checkpoint_sha256: the tokenizer whose latents are expected; None for any.

    Raises:
        LatentsError: the folder is incomplete, damaged, another tokenizer's, lacks mirror images, or is too
            small for one batch.
    """

    def __init__(
        self,
        directory: str | Path,
        batch_size: int,
        seed: int = 0,
        flips: bool = False,
        buffer_rows: int = BUFFER_ROWS,
        rank: int | None = None,
        world_size: int | None = None,
        checkpoint_sha256: str | None = None,
    ) -> None:
        self.folder = LatentFolder(directory, checkpoint_sha256)
        self.batch_size = batch_size
        self.seed = seed
        self.num_views = self.folder.num_views(flips)
        self.buffer_rows = buffer_rows
        self.rank, self.world_size = _rank(rank, world_size)
        # Shared memory, so that persistent workers see a new epoch.
        self._start = torch.zeros(2, dtype=torch.int64).share_memory_()
        if not len(self):
            raise LatentsError(
                f"{directory}: {len(self.folder) * self.num_views} rows are fewer than one batch of "
                f"{batch_size} for each of {self.world_size} ranks"
            )

    def __len__(self) -> int:
        """Batches of a whole epoch, alike on every rank."""
        return len(self.folder) * self.num_views // (self.batch_size * self.world_size)

    def start(self, epoch: int, batch: int = 0) -> None:
        """Choose what the next iteration gives: ``epoch``, from its batch number ``batch`` on."""
        self._start.copy_(torch.tensor([epoch, batch]))

    def __iter__(self) -> Iterator[LatentRows]:
        epoch, first = self._start.tolist()
        worker = get_worker_info()
        offset, stride = (worker.id, worker.num_workers) if worker else (0, 1)
        order = self._order(epoch)
        for number in range(first + offset, len(self), stride):
            place = (number * self.world_size + self.rank) * self.batch_size
            yield self.folder.rows(order[place : place + self.batch_size].tolist())

    def _order(self, epoch: int) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
        """Views of rows, `LatentFolder.rows`' numbers, in the order of an epoch."""
        random = np.random.default_rng((self.seed, epoch))
        shards = [view for part in self.folder.shard_ranges for view in self._views(part)]
        placed = np.concatenate([shards[number] for number in random.permutation(len(shards))])
        wandering = np.arange(len(placed)) + random.uniform(0, self.buffer_rows, len(placed))
        return placed[np.argsort(wandering, kind="stable")]

    def _views(self, rows: range) -> "Iterator[np.ndarray[tuple[int], np.dtype[np.int64]]]":
        """The rows of a shard, and their mirror images apart from them."""
        for view in range(self.num_views):
            yield np.arange(rows.start, rows.stop) + view * len(self.folder)


def _rank(rank: int | None, world_size: int | None) -> tuple[int, int]:
    if (rank is None) != (world_size is None):
        raise ValueError("rank and world_size are given together, or neither")
    if rank is not None and world_size is not None:
        return rank, world_size
    distributed = torch.distributed
    if distributed.is_available() and distributed.is_initialized():
        return distributed.get_rank(), distributed.get_world_size()
    return 0, 1
