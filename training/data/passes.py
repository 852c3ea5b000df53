"""Resumable passes over a list of images: batches in, the finished shards of all ranks out.

A pass visits every listed image once, on any number of ranks. What a rank has done is one `Shard`, written
atomically every so often; a pass that was killed goes on with the positions that no shard covers, on
however many ranks there are then. Shards come out in the order of their first positions.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from model.process import num_cpus
from training.data.batches import Batch, evaluation_batches
from training.data.shards import Shard, ShardStore
from training.data.sources import Sample
from training.distributed.ranks import Ranks

logger = logging.getLogger(__name__)

SAVE_EVERY_S = 60.0
RANKS_TIMEOUT_S = 3600.0  # how long a rank waits for one whose images are slower
MAX_WORKERS = 8


class Accumulator(Protocol):
    """Computation of a pass."""

    def add(self, positions: Sequence[int], batch: Batch) -> None:
        """Take a batch; ``positions`` are those of its images, broken ones left out."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Tensors and facts of everything added so far."""


@dataclass(frozen=True)
class PassConfig:
    """Settings of a pass.

    Attributes:
        side: of the centre crop, pixels.
        batch_size: images at once.
        num_workers: processes that decode images.
        save_every_s: how often a rank writes its shard, seconds.
        progress: whether to show a bar.
        title: the bar's name.
    """

    side: int
    batch_size: int
    title: str
    num_workers: int = 0
    save_every_s: float = SAVE_EVERY_S
    progress: bool = True


def run_pass(
    samples: Sequence[Sample],
    accumulator: Accumulator,
    store: ShardStore,
    config: PassConfig,
    ranks: Ranks,
) -> list[Shard]:
    """Give every listed image to one rank's accumulator; collective.

    Work that ``store`` still has of a run that was cut off is not done again.

    Returns:
        The shards of all ranks and of runs before, on every rank alike, in the order of first positions.

    Raises:
        TrainingError: ``store`` holds another run.
    """
    earlier = ranks.on_main(store.read)
    done = [position for shard in earlier for position in shard.positions]
    covered = set(done)
    mine = share([p for p in range(len(samples)) if p not in covered], ranks)
    if covered and ranks.is_main:
        logger.info("resumed: %d of %d images were done before", len(covered), len(samples))
    own = _work(samples, mine, accumulator, store, config, ranks)
    gathered = [shard for shard in ranks.all_gather_object(own) if shard.positions]
    return sorted([*earlier, *gathered], key=lambda shard: shard.positions[0])


def share(positions: Sequence[int], ranks: Ranks) -> list[int]:
    """The contiguous part of ``positions`` that is this rank's; sizes differ by one at most."""
    low, high = (len(positions) * index // ranks.size for index in (ranks.rank, ranks.rank + 1))
    return list(positions[low:high])


def read_batches(
    samples: Sequence[Sample], positions: Sequence[int], side: int, batch_size: int, num_workers: int
) -> Iterator[tuple[list[int], list[int], Batch | None]]:
    """Centre-cropped images at ``positions`` of ``samples``, decoded ahead by worker processes.

    Yields:
        All positions of a batch, those of its readable images, and the batch; None where all are broken.
    """
    chunks = [list(positions[start : start + batch_size]) for start in range(0, len(positions), batch_size)]
    dataset = _ChunkDataset(samples, chunks, side)
    yield from DataLoader(
        dataset, batch_size=None, num_workers=num_workers, collate_fn=_as_it_is, persistent_workers=False
    )


def default_workers(device: torch.device) -> int:
    """Processes that decode: none where the processor computes the model too."""
    return 0 if device.type == "cpu" else min(MAX_WORKERS, num_cpus())


def _work(
    samples: Sequence[Sample],
    positions: list[int],
    accumulator: Accumulator,
    store: ShardStore,
    config: PassConfig,
    ranks: Ranks,
) -> Shard:
    finished: list[int] = []
    saved_at = time.monotonic()
    # Shares are equal, so that rank 0's bar, scaled to all ranks, is close enough.
    total, initial = len(samples), len(samples) - len(positions) * ranks.size
    hidden = not (config.progress and ranks.is_main)
    with tqdm(total=total, initial=max(0, initial), unit="image", desc=config.title, disable=hidden) as bar:
        for chunk, kept, batch in read_batches(
            samples, positions, config.side, config.batch_size, config.num_workers
        ):
            _add(accumulator, kept, batch)
            finished += chunk
            bar.update(min(len(chunk) * ranks.size, total - bar.n))
            if time.monotonic() - saved_at >= config.save_every_s:
                store.write(Shard(finished, *accumulator.state()))
                saved_at = time.monotonic()
    shard = Shard(finished, *accumulator.state())
    store.write(shard)
    return shard


def _add(accumulator: Accumulator, kept: list[int], batch: Batch | None) -> None:
    if batch is not None:
        accumulator.add(kept, batch)


class _ChunkDataset(Dataset[tuple[list[int], list[int], Batch | None]]):
    def __init__(self, samples: Sequence[Sample], chunks: list[list[int]], side: int) -> None:
        self.samples = samples
        self.chunks = chunks
        self.side = side

    def __len__(self) -> int:
        return len(self.chunks)

    def __getitem__(self, index: int) -> tuple[list[int], list[int], Batch | None]:
        chunk = self.chunks[index]
        listed = [self.samples[position] for position in chunk]
        found = next(evaluation_batches(listed, self.side, len(listed)), None)
        if found is None:
            return chunk, [], None
        kept = {id(sample) for sample in found[0]}
        return chunk, [p for p, s in zip(chunk, listed, strict=True) if id(s) in kept], found[1]


def _as_it_is(item: object) -> object:
    return item
