"""Reconstruction quality over a list of images, on any number of ranks.

Per image PSNR, SSIM and LPIPS; over the set, Frechet distances between originals and reconstructions. The
latter see 8-bit pictures, as they would be stored.

Shape legend: B batch.
"""

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from model.metrics import psnr, ssim
from model.pixels import to_bytes
from model.tokenizer import LatentKind, Tokenizer
from training.data import Batch
from training.distributed import Ranks
from training.errors import DataError, WeightsError
from training.feature_networks import (
    EFFICIENTNET_COLUMN,
    INCEPTION_COLUMN,
    EfficientNetFeatures,
    FeatureNetwork,
    InceptionFeatures,
)
from training.frechet import frechet_distance
from training.moments import FeatureMoments
from training.passes import PassConfig, run_pass
from training.perceptual import Lpips, find_lpips
from training.shards import Shard, ShardStore
from training.sources import Sample

MetricName = Literal["psnr", "ssim", "lpips", "frechet_efficientnet_lite0", "rfid"]
METRICS: tuple[MetricName, ...] = get_args(MetricName)
IMAGE_COLUMNS = {"psnr": "psnr_db", "ssim": "ssim", "lpips": "lpips_vgg"}


@dataclass(frozen=True)
class WeightFiles:
    """Weights that metrics need; None for where their libraries keep them."""

    vgg: Path | None = None
    lpips: Path | None = None
    inception: Path | None = None


class Metrics:
    """The metrics of one run, with their networks.

    Attributes:
        columns: those of an image's figures, in order.
        networks: for the Frechet distances.
        skipped: metric to the reason why it is not measured.
    """

    def __init__(self, wanted: Collection[str] | None, files: WeightFiles, device: torch.device) -> None:
        """Load what ``wanted`` names; by default every metric whose weights are here.

        Raises:
            WeightsError: a metric that is named and cannot be measured; says what it needs.
        """
        self.skipped: dict[str, str] = {}
        self.lpips: Lpips | None = None
        self.networks: list[FeatureNetwork] = []
        self.columns = [IMAGE_COLUMNS[name] for name in ("psnr", "ssim") if wanted is None or name in wanted]
        for name in METRICS[2:]:
            if wanted is not None and name not in wanted:
                continue
            try:
                self._load(name, files, device)
            except WeightsError as exc:
                if wanted is not None:
                    raise
                self.skipped[name] = str(exc)

    def _load(self, name: str, files: WeightFiles, device: torch.device) -> None:
        if name == "lpips":
            self.lpips = Lpips(*find_lpips(files.vgg, files.lpips)).to(device)
            self.columns.append(IMAGE_COLUMNS[name])
        elif name == EFFICIENTNET_COLUMN:
            self.networks.append(EfficientNetFeatures(device))
        elif name == INCEPTION_COLUMN:
            self.networks.append(InceptionFeatures(files.inception, device))

    @property
    def ranking(self) -> str | None:
        """The column that says which reconstructions are worst: LPIPS, else PSNR, else SSIM."""
        preferred = ("lpips_vgg", "psnr_db", "ssim")
        return next((column for column in preferred if column in self.columns), None)

    def measure(self, reconstructions: Tensor, images: Tensor) -> list[list[float]]:
        """Figures of each image in the order of `columns`; both [B, 3, S, S] in [0, 1]."""
        measures = {"psnr_db": psnr, "ssim": ssim, "lpips_vgg": self.lpips}
        columns = []
        for column in self.columns:
            measure = measures[column]
            assert measure is not None
            columns.append(measure(reconstructions, images).double().tolist())
        return [list(row) for row in zip(*columns, strict=True)] if columns else [[] for _ in images]


@dataclass(frozen=True)
class ImageFigures:
    """One image's figures by latent, in the order of `Metrics.columns`."""

    position: int
    figures: dict[LatentKind, list[float]]


@dataclass(frozen=True)
class Quality:
    """Result of a pass.

    Attributes:
        means: latent to column to mean over images; Frechet distances are of the whole set, and None
            where fewer than two images were read.
        images: each readable image, in the order of the list.
        num_broken: images that could not be decoded.
    """

    means: dict[LatentKind, dict[str, float | None]]
    images: list[ImageFigures]
    num_broken: int


@torch.no_grad()
def measure_quality(
    tokenizer: Tokenizer,
    samples: Sequence[Sample],
    latents: Sequence[LatentKind],
    metrics: Metrics,
    config: PassConfig,
    store: ShardStore,
    ranks: Ranks,
) -> Quality:
    """Reconstruct every image by way of each latent and measure; collective, the same on every rank.

    Raises:
        DataError: no image could be decoded.
        TrainingError: ``store`` holds another run.
    """
    shards = run_pass(samples, _QualityAccumulator(tokenizer, latents, metrics), store, config, ranks)
    rows = sorted((row for shard in shards for row in shard.facts["rows"]), key=lambda row: int(row[0]))
    if not rows:
        raise DataError(f"none of the {len(samples)} images could be decoded")
    images = [ImageFigures(p, dict(zip(latents, figures, strict=True))) for p, *figures in rows]
    means: dict[LatentKind, dict[str, float | None]] = {}
    for latent in latents:
        columns = zip(*(image.figures[latent] for image in images), strict=True)
        means[latent] = {
            name: sum(column) / len(column) for name, column in zip(metrics.columns, columns, strict=True)
        }
    for network in metrics.networks:
        originals = _merged(shards, network, "original")
        for latent in latents:
            means[latent][network.column] = frechet_distance(originals, _merged(shards, network, latent))
    return Quality(means, images, len(samples) - len(images))


class _QualityAccumulator:
    """Figures of each image, and moments of features of originals and of each latent's reconstructions."""

    def __init__(self, tokenizer: Tokenizer, latents: Sequence[LatentKind], metrics: Metrics) -> None:
        self.tokenizer = tokenizer
        self.latents = latents
        self.metrics = metrics
        self.rows: list[list[Any]] = []
        self.moments = {
            _moments_name(network, kind): FeatureMoments(network.width, tokenizer.device)
            for network in metrics.networks
            for kind in ("original", *latents)
        }

    def add(self, positions: Sequence[int], batch: Batch) -> None:
        images = batch.pixels(self.tokenizer.device)
        self._add_features("original", images)
        rows: list[list[Any]] = [[position] for position in positions]
        for latent in self.latents:
            reconstructions = self.tokenizer.reconstruct(images, latent).float()
            for row, figures in zip(rows, self.metrics.measure(reconstructions, images), strict=True):
                row.append(figures)
            self._add_features(latent, reconstructions)
        self.rows += rows

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = {}
        for name, moments in self.moments.items():
            tensors |= moments.tensors(name)
        return tensors, {"rows": self.rows}

    def _add_features(self, kind: str, images: Tensor) -> None:
        for network in self.metrics.networks:
            self.moments[_moments_name(network, kind)].update(network.features(to_bytes(images)))


def _moments_name(network: FeatureNetwork, kind: str) -> str:
    return f"{network.column}.{kind}"


def _merged(shards: Sequence[Shard], network: FeatureNetwork, kind: str) -> FeatureMoments:
    merged = FeatureMoments(network.width)
    for shard in shards:
        merged.merge(FeatureMoments(network.width).restore(shard.tensors, _moments_name(network, kind)))
    return merged
