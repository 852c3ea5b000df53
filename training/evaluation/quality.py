"""Reconstruction quality over a list of images, on any number of ranks.

Per image PSNR, SSIM, LPIPS, edge ratio and detail, and the PSNR of linear readouts, which say what the
latents hold whatever the decoder makes of it; over the set, Frechet distances between originals and
reconstructions. The latter see 8-bit pictures, as they would be stored.

Shape legend: B batch.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from model.images.similarity import detail, edge_ratio, psnr, ssim
from model.images.tensors import to_bytes
from model.tokenizer import LatentKind
from training.data.batches import Batch
from training.data.passes import PassConfig, run_pass
from training.data.shards import Shard, ShardStore
from training.data.sources import Sample
from training.distributed.ranks import Ranks
from training.errors import DataError, WeightsError
from training.evaluation.autoencoders import Autoencoder
from training.evaluation.feature_networks import (
    EFFICIENTNET_COLUMN,
    INCEPTION_COLUMN,
    EfficientNetFeatures,
    FeatureNetwork,
    InceptionFeatures,
)
from training.evaluation.frechet import frechet_distance
from training.evaluation.moments import FeatureMoments
from training.evaluation.readout import Readouts
from training.losses.perceptual import Lpips, find_lpips

MetricName = Literal[
    "psnr", "ssim", "edge_ratio", "detail", "readout", "lpips", "frechet_efficientnet_lite0", "rfid"
]
METRICS: tuple[MetricName, ...] = get_args(MetricName)
IMAGE_COLUMNS = {
    "psnr": "psnr_db",
    "ssim": "ssim",
    "edge_ratio": "edge_ratio",
    "detail": "detail",
    "lpips": "lpips_vgg",
}
READOUT_COLUMNS = ("readout_db", "readout_3x3_db")
Measure = Callable[[Tensor, Tensor], Tensor]


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
        readouts: of each latent, for ``readout``; empty where it is not measured.
        skipped: metric to the reason why it is not measured.
    """

    def __init__(
        self,
        wanted: Collection[str] | None,
        files: WeightFiles,
        tokenizer: Autoencoder,
        readouts: Mapping[LatentKind, Readouts] | None = None,
    ) -> None:
        """Load what ``wanted`` names; by default every metric whose weights and photos are here.

        Raises:
            WeightsError: a metric that is named and cannot be measured; says what it needs.
        """
        self.skipped: dict[str, str] = {}
        self.networks: list[FeatureNetwork] = []
        self.readouts = readouts or {}
        self._measures: dict[str, Measure] = {}
        self.columns: list[str] = []
        for name in METRICS:
            if wanted is not None and name not in wanted:
                continue
            try:
                self._load(name, files, tokenizer)
            except WeightsError as exc:
                if wanted is not None:
                    raise
                self.skipped[name] = str(exc)

    def _load(self, name: MetricName, files: WeightFiles, tokenizer: Autoencoder) -> None:
        device, patch_size = tokenizer.device, tokenizer.config.decoder.patch_size
        if name == EFFICIENTNET_COLUMN:
            self.networks.append(EfficientNetFeatures(device))
        elif name == INCEPTION_COLUMN:
            self.networks.append(InceptionFeatures(files.inception, device))
        elif name == "readout":
            if not self.readouts:
                raise WeightsError("readout needs photos to fit it on: name them with --readout-photos")
            self.columns += READOUT_COLUMNS
        else:
            self._measures[IMAGE_COLUMNS[name]] = _image_measure(name, files, device, patch_size)
            self.columns.append(IMAGE_COLUMNS[name])

    @property
    def ranking(self) -> str | None:
        """The column that says which reconstructions are worst: LPIPS, else PSNR, else SSIM."""
        preferred = ("lpips_vgg", "psnr_db", "ssim")
        return next((column for column in preferred if column in self.columns), None)

    def measure(
        self, tokens: Tensor, latent: LatentKind, reconstructions: Tensor, images: Tensor
    ) -> list[list[float]]:
        """Figures of each image in the order of `columns`.

        Args:
            tokens: the images' latents, [B, N, C].
            latent: their kind.
            reconstructions, images: [B, 3, S, S] in [0, 1].
        """
        found = {name: measure(reconstructions, images) for name, measure in self._measures.items()}
        if self.readouts:
            read = self.readouts[latent].images(tokens)
            found |= {name: psnr(pixels, images) for name, pixels in zip(READOUT_COLUMNS, read, strict=True)}
        columns = [found[name].double().tolist() for name in self.columns]
        return [list(row) for row in zip(*columns, strict=True)] if columns else [[] for _ in images]


def _image_measure(name: MetricName, files: WeightFiles, device: torch.device, patch_size: int) -> Measure:
    """Function from reconstructions and images, both [B, 3, S, S], to one figure per image."""
    if name == "lpips":
        return Lpips(*find_lpips(files.vgg, files.lpips)).to(device)
    measures: dict[str, Measure] = {
        "psnr": psnr,
        "ssim": ssim,
        "edge_ratio": lambda reconstructions, _: edge_ratio(reconstructions, patch_size),
        "detail": partial(detail, patch_size=patch_size),
    }
    return measures[name]


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
    tokenizer: Autoencoder,
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

    def __init__(self, tokenizer: Autoencoder, latents: Sequence[LatentKind], metrics: Metrics) -> None:
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
            latents = self.tokenizer.encode(images, latent)
            reconstructions = self.tokenizer.decode(latents).float()
            tokens = latents.flatten(2).transpose(1, 2).float()
            figures = self.metrics.measure(tokens, latent, reconstructions, images)
            for row, own in zip(rows, figures, strict=True):
                row.append(own)
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
