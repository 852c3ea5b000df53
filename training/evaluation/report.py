"""The report of an evaluation: JSON, a Markdown table, a CSV of images, and a grid of worst and best."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from training.data.passes import read_batches
from training.data.sources import Sample
from training.evaluation.autoencoders import Autoencoder
from training.evaluation.frechet import bias_note
from training.evaluation.quality import ImageFigures, Metrics, Quality
from training.output.files import write_atomically
from training.output.grids import reconstruction_grid

GRID_IMAGES = 8
GRID_BATCH_SIZE = 8
IMAGE_TITLES = {
    "psnr_db": "PSNR, dB",
    "ssim": "SSIM",
    "edge_ratio": "edge ratio",
    "detail": "detail",
    "readout_db": "readout, dB",
    "readout_3x3_db": "readout 3x3, dB",
    "lpips_vgg": "LPIPS (VGG)",
}
DIGITS = {
    "psnr_db": 3,
    "ssim": 5,
    "edge_ratio": 4,
    "detail": 4,
    "readout_db": 3,
    "readout_3x3_db": 3,
    "lpips_vgg": 5,
}
CAPTIONED = ("psnr_db", "ssim", "lpips_vgg")
SMALLER_IS_BETTER = frozenset({"lpips_vgg"})
DEFINITIONS = {
    "psnr_db": "mean over images of 10 log10(1 / mean squared error over RGB), pixels in [0, 1]",
    "ssim": "mean over images and RGB; Gaussian window of sigma 1.5 and 11 pixels, population covariance "
    "(scikit-image: gaussian_weights=True, sigma=1.5, use_sample_covariance=False, data_range=1)",
    "edge_ratio": "mean over images of the mean absolute difference of neighbouring pixels across patch "
    "borders over that inside patches; photos have about 1.04, a mosaic several times that",
    "detail": "mean over images of the mean absolute difference of neighbouring pixels inside patches, as a "
    "share of the original's",
    "readout_db": "PSNR of the ridge regression of a latent token's patch on the token, fitted on the photos "
    "of --readout-photos: what the latents hold, whatever the decoder",
    "readout_3x3_db": "the same of the token and its eight neighbours: what a trained decoder has to beat",
    "lpips_vgg": "LPIPS v0.1 with VGG16, mean over images",
    "frechet_efficientnet_lite0": "Frechet distance between the pooled EfficientNet-Lite0 features "
    "(ImageNet weights, 224 pixels) of originals and 8-bit reconstructions; not an FID",
    "rfid": "FID between originals and 8-bit reconstructions: Inception v3 (2015-12-05) by torch-fidelity",
}


@dataclass(frozen=True)
class Report:
    """Results of an evaluation with their tokenizer and images."""

    tokenizer: Autoencoder
    samples: Sequence[Sample]
    metrics: Metrics
    quality: Quality
    left_out: Mapping[str, int] = field(default_factory=dict)
    """Numbers of files and members of the data that are not among the samples, by the reason."""

    def summary(self) -> dict[str, Any]:
        """Everything but the images' own figures; values that are not finite become null."""
        checkpoint = self.tokenizer.checkpoint
        return {
            "checkpoint": self.tokenizer.config.name,
            "checkpoint_sha256": checkpoint.sha256 if checkpoint else None,
            "num_images": len(self.quality.images),
            "num_broken_images": self.quality.num_broken,
            "left_out": dict(self.left_out),
            "image_size": self.tokenizer.config.image_size,
            "results": {
                latent: {name: _number(name, value) for name, value in means.items()}
                for latent, means in self.quality.means.items()
            },
            "definitions": {name: DEFINITIONS[name] for name in self.columns},
            "notes": self.notes(),
            "not_measured": self.metrics.skipped,
        }

    @property
    def columns(self) -> list[str]:
        return [*self.metrics.columns, *(network.column for network in self.metrics.networks)]

    def notes(self) -> dict[str, str]:
        """Warnings by distance, to read before comparing it."""
        num_images = len(self.quality.images)
        notes = {network.column: bias_note(num_images, network.width) for network in self.metrics.networks}
        return {name: note for name, note in notes.items() if note is not None}

    def json(self) -> str:
        """The summary as JSON."""
        return json.dumps(self.summary(), indent=2, allow_nan=False)

    def markdown(self) -> str:
        """The summary as a table, with its notes below."""
        titles = IMAGE_TITLES | {network.column: network.title for network in self.metrics.networks}
        rows = [["latent", *(titles[name] for name in self.columns)], ["---"] * (len(self.columns) + 1)]
        for latent, means in self.summary()["results"].items():
            rows.append([latent, *("n/a" if v is None else str(v) for v in means.values())])
        table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
        lines = [f"- {titles[name]}: {note}." for name, note in self.notes().items()]
        lines += [f"- {name}: not measured: {reason}." for name, reason in self.metrics.skipped.items()]
        lines += [f"- left out of the data: {count} x {reason}." for reason, count in self.left_out.items()]
        quality, config = self.quality, self.tokenizer.config
        broken = f", {quality.num_broken} more could not be decoded" if quality.num_broken else ""
        heading = (
            f"`{config.name}` on {len(quality.images)} images, {config.image_size} x {config.image_size}"
            f" pixels{broken}"
        )
        return "\n".join([heading, "", table, "", *lines]).rstrip() + "\n"

    def csv(self) -> str:
        """One row per image and latent."""
        stream = io.StringIO()
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(["image", "file", "latent", *self.metrics.columns])
        for image in self.quality.images:
            sample = self.samples[image.position]
            for latent, figures in image.figures.items():
                values = (_text(name, v) for name, v in zip(self.metrics.columns, figures, strict=True))
                writer.writerow([sample.key, sample.file_name, latent, *values])
        return stream.getvalue()

    def grid(self) -> Image.Image | None:
        """Originals and reconstructions of the worst and the best images by the last latent's ranking."""
        column = self.metrics.ranking
        if column is None:
            return None
        index = self.metrics.columns.index(column)
        latents = list(self.quality.means)
        sign = -1 if column in SMALLER_IS_BETTER else 1
        ranked = sorted(self.quality.images, key=lambda image: sign * image.figures[latents[-1]][index])
        half = min(GRID_IMAGES, max(1, len(ranked) // 2))
        groups = {"worst": ranked[:half], "best": ranked[-half:][::-1]}
        rows, labels, captions = [], [], []
        for name, images in groups.items():
            originals = self._originals(images)
            rows.append(originals)
            labels.append(
                f"{name} {len(images)} of {len(ranked)} by {IMAGE_TITLES[column]}, {latents[-1]} latents"
            )
            captions.append([self.samples[image.position].key for image in images])
            for latent in latents:
                rows.append(self.tokenizer.reconstruct(originals, latent).float().cpu())
                labels.append(f"reconstructions, {latent} latents")
                captions.append([self._caption(image.figures[latent]) for image in images])
        return reconstruction_grid(rows, labels, captions)

    def _caption(self, figures: Sequence[float]) -> str:
        pairs = zip(self.metrics.columns, figures, strict=True)
        return ", ".join(
            f"{IMAGE_TITLES[name].split(',')[0]} {value:.{2 + (value < 1)}f}"
            for name, value in pairs
            if name in CAPTIONED
        )

    def _originals(self, images: Sequence[ImageFigures]) -> torch.Tensor:
        positions = [image.position for image in images]
        side = self.tokenizer.config.image_size
        batches = read_batches(self.samples, positions, side, GRID_BATCH_SIZE, num_workers=0)
        cpu = torch.device("cpu")
        return torch.cat([batch.pixels(cpu) for _, _, batch in batches if batch is not None])


def write_report(report: Report, folder: Path) -> None:
    """Write evaluation.json, evaluation.md, images.csv and grid.png, each whole or not at all."""
    write_atomically(folder / "evaluation.json", report.json() + "\n")
    write_atomically(folder / "evaluation.md", report.markdown())
    write_atomically(folder / "images.csv", report.csv())
    grid = report.grid()
    if grid is not None:
        buffer = io.BytesIO()
        grid.save(buffer, "PNG")
        write_atomically(folder / "grid.png", buffer.getvalue())


def _number(column: str, value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else round(value, DIGITS.get(column, 4))


def _text(column: str, value: float) -> str:
    return f"{value:.{DIGITS[column]}f}"
