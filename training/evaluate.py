"""Reconstruction quality over a set of images: PSNR and SSIM, per image and on average."""

import csv
import json
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from kernels.dispatch import FusionSetting
from model.metrics import psnr, ssim
from model.tokenizer import LatentKind, Tokenizer
from training.data import evaluation_batches
from training.errors import DataError
from training.optimization import resolve_device
from training.pictures import reconstruction_grid, save_image
from training.sources import list_samples

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Evaluation:
    """Mean figures, each image's, and the first few pictures.

    Attributes:
        psnr_db, ssim: means over images.
        per_image: (key, PSNR in dB, SSIM) of each image.
        num_broken: images that could not be decoded.
        originals, reconstructions: [num_pictures, 3, S, S] in [0, 1].
    """

    psnr_db: float
    ssim: float
    per_image: list[tuple[str, float, float]]
    num_broken: int
    originals: Tensor
    reconstructions: Tensor


@torch.no_grad()
def evaluate_tokenizer(
    tokenizer: Tokenizer,
    paths: Sequence[Path],
    batch_size: int = 25,
    latent: LatentKind = "enriched",
    num_pictures: int = 8,
    progress: bool = True,
) -> Evaluation:
    """Reconstruct every image of folders or shards, centre-cropped to the tokenizer's size.

    Raises:
        DataError: no images, or none that can be decoded.
    """
    per_image: list[tuple[str, float, float]] = []
    pictures: list[tuple[Tensor, Tensor]] = []
    listed, num_broken = list_samples(paths), 0
    with tqdm(total=len(listed), unit="image", desc="evaluate", disable=not progress) as bar:
        for samples, batch in evaluation_batches(listed, tokenizer.config.image_size, batch_size):
            images = batch.pixels(tokenizer.device)
            reconstructions = tokenizer.reconstruct(images, latent).float()
            figures = zip(
                psnr(reconstructions, images).tolist(), ssim(reconstructions, images).tolist(), strict=True
            )
            per_image += [(sample.key, *pair) for sample, pair in zip(samples, figures, strict=True)]
            pictures += list(zip(images.cpu(), reconstructions.cpu(), strict=True))[
                : num_pictures - len(pictures)
            ]
            num_broken += batch.num_broken
            bar.update(len(samples) + batch.num_broken)
    if not per_image:
        raise DataError(f"none of the {len(listed)} images could be decoded")
    originals, decoded = (torch.stack(column) for column in zip(*pictures, strict=True))
    return Evaluation(
        psnr_db=sum(row[1] for row in per_image) / len(per_image),
        ssim=sum(row[2] for row in per_image) / len(per_image),
        per_image=per_image,
        num_broken=num_broken,
        originals=originals,
        reconstructions=decoded,
    )


def evaluate_command(
    checkpoint: str,
    data: Path,
    output: Path | None = None,
    batch_size: int = 25,
    device: str = "auto",
    fusion: FusionSetting = "auto",
) -> int:
    """``drorae evaluate``: prints the means; with ``output`` writes JSON, a CSV of images and a grid.

    Raises:
        TrainingError, model.errors.ModelError: one sentence that names what is at fault.
    """
    tokenizer = Tokenizer.load(checkpoint, device=resolve_device(device), fusion=fusion)
    report = evaluate_tokenizer(tokenizer, [data], batch_size)
    summary = {
        "checkpoint": tokenizer.config.name,
        "checkpoint_sha256": tokenizer.checkpoint.sha256 if tokenizer.checkpoint else None,
        "num_images": len(report.per_image),
        "num_broken_images": report.num_broken,
        "psnr_db": round(report.psnr_db, 4),
        "ssim": round(report.ssim, 5),
    }
    logger.info("evaluated %s", summary)
    print(json.dumps(summary, indent=2))  # noqa: T201 - the command's own output
    if output is not None:
        output.mkdir(parents=True, exist_ok=True)
        (output / "evaluation.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        with (output / "images.csv").open("w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(["image", "psnr_db", "ssim"])
            writer.writerows((key, f"{p:.4f}", f"{s:.5f}") for key, p, s in report.per_image)
        grid = reconstruction_grid([report.originals, report.reconstructions], ["original", "reconstruction"])
        save_image(grid, output / "grid.png")
    return 0
