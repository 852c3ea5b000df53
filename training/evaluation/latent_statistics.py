"""Mean and variance of enriched latents per position, as generators need them.

Shape legend: B batch, C latent width, h w latent grid.
"""

import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from model.checkpoints.tokenizers import BUNDLED_DIRECTORY, resolve_checkpoint, write_with_statistics
from model.tokenizer import Tokenizer
from training.data.batches import Batch
from training.data.passes import (
    RANKS_TIMEOUT_S,
    SAVE_EVERY_S,
    PassConfig,
    default_workers,
    run_pass,
)
from training.data.shards import ShardStore, listing_sha256
from training.data.sources import Sample, list_samples, spread_samples
from training.distributed.device import resolve_device
from training.distributed.ranks import Ranks, current, process_group
from training.errors import DataError, TrainingError
from training.evaluation.moments import PointwiseMoments

logger = logging.getLogger(__name__)

STATISTICS_BATCH_SIZE = 32
STATISTICS_LIMIT = 2048


@dataclass(frozen=True)
class LatentStatistics:
    """Result of a pass.

    Attributes:
        mean, var: [C, h, w] float64; the variance is the biased one.
        num_images, num_broken: images that count, and those that could not be decoded.
    """

    mean: Tensor
    var: Tensor
    num_images: int
    num_broken: int

    def summary(self) -> dict[str, Any]:
        """Range of means and deviations over all positions, for a person to check."""
        deviation = self.var.sqrt()
        return {
            "num_images": self.num_images,
            "num_broken_images": self.num_broken,
            "mean": _range(self.mean),
            "deviation": _range(deviation),
        }


@torch.no_grad()
def latent_statistics(
    tokenizer: Tokenizer, samples: Sequence[Sample], limit: int = STATISTICS_LIMIT
) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of the enriched latents of centre-cropped images, on this rank alone.

    Args:
        tokenizer: gives the latents.
        samples: images.
        limit: how many of them are used at most, spread evenly.

    Returns:
        Mean and variance, each [C, h, w] float32.

    Raises:
        DataError: no image could be decoded.
    """
    chosen = spread_samples(samples, limit)
    config = PassConfig(
        tokenizer.config.image_size, STATISTICS_BATCH_SIZE, title="statistics", progress=False
    )
    found = measure_statistics(tokenizer, chosen, config, ShardStore(None, {}), Ranks())
    return found.mean.float(), found.var.float()


@torch.no_grad()
def measure_statistics(
    tokenizer: Tokenizer, samples: Sequence[Sample], config: PassConfig, store: ShardStore, ranks: Ranks
) -> LatentStatistics:
    """Exact streaming mean and variance over the samples; collective, the same on every rank.

    Raises:
        DataError: no image could be decoded.
        TrainingError: ``store`` holds another run.
    """
    shards = run_pass(samples, _LatentAccumulator(tokenizer), store, config, ranks)
    moments = PointwiseMoments(tokenizer.config.latent_shape)
    for shard in shards:
        moments.merge(PointwiseMoments(moments.mean.shape).restore(shard.tensors, "latents"))
    if moments.count == 0:
        raise DataError(f"latent statistics: none of the {len(samples)} images could be decoded")
    return LatentStatistics(moments.mean, moments.variance, moments.count, len(samples) - moments.count)


class _LatentAccumulator:
    """Moments of the latents as the tokenizer gives them, in float64 on its device."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.moments = PointwiseMoments(tokenizer.config.latent_shape, tokenizer.device)

    def add(self, positions: Sequence[int], batch: Batch) -> None:
        self.moments.update(self.tokenizer.encode(batch.pixels(self.tokenizer.device)))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return self.moments.tensors("latents"), {}


@dataclass(frozen=True)
class StatisticsOptions:
    """Options of ``drorae stats``; see its help.

    Attributes:
        output: checkpoint to write, which may be the one read; None to print only.
        limit: images used at most, spread over the data; None for all.
        num_workers: processes that decode images; None for what suits the device.
        save_every_s: how often unfinished work is kept, seconds.
    """

    checkpoint: str
    data: list[Path]
    output: Path | None = None
    limit: int | None = None
    batch_size: int = STATISTICS_BATCH_SIZE
    device: str = "auto"
    num_workers: int | None = None
    save_every_s: float = SAVE_EVERY_S


def statistics_command(options: StatisticsOptions) -> int:
    """``drorae stats``: measures, stores in a checkpoint, and prints a summary as JSON.

    A run that was cut off goes on: its state is beside the checkpoint that it writes.

    Raises:
        TrainingError, model.errors.ModelError: one sentence that names what is at fault.
    """
    with process_group(options.device, RANKS_TIMEOUT_S):
        return _run_statistics(options, current())


def _run_statistics(options: StatisticsOptions, ranks: Ranks) -> int:
    source = resolve_checkpoint(options.checkpoint)
    if options.output is not None and options.output.absolute().is_relative_to(BUNDLED_DIRECTORY):
        raise TrainingError(f"{options.checkpoint} is bundled with the program: name another --output")
    tokenizer = Tokenizer.load(source, device=resolve_device(options.device))
    assert tokenizer.checkpoint is not None
    listing = list_samples(options.data, ranks)
    samples = spread_samples(listing, options.limit)
    workers = default_workers(tokenizer.device) if options.num_workers is None else options.num_workers
    config = PassConfig(
        tokenizer.config.image_size, options.batch_size, "statistics", workers, options.save_every_s
    )
    identity = {"checkpoint": tokenizer.checkpoint.sha256, "data": listing_sha256(samples)}
    store = ShardStore(_state_directory(options.output), identity)
    found = measure_statistics(tokenizer, samples, config, store, ranks)
    if ranks.is_main:
        summary = {"checkpoint": tokenizer.config.name, "output": None, **found.summary()}
        summary["left_out"] = dict(listing.left_out)
        if options.output is not None:
            tokenizer.set_statistics(found.mean, found.var)  # refuses what could not be loaded again
            provenance = {"data": [str(path) for path in options.data], **found.summary()}
            info = write_with_statistics(source, options.output, found.mean, found.var, provenance)
            summary |= {"output": str(options.output), "checkpoint_sha256": info.sha256}
            store.remove()
        print(json.dumps(summary, indent=2))  # noqa: T201 - the command's own output
    return 0


def _state_directory(output: Path | None) -> Path | None:
    return None if output is None else output.absolute().with_name(f".{output.absolute().name}.statistics")


def _range(values: Tensor) -> dict[str, float]:
    return {
        "smallest": round(float(values.min()), 6),
        "mean": round(float(values.mean()), 6),
        "largest": round(float(values.max()), 6),
    }
