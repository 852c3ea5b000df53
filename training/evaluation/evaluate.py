"""Evaluation: PSNR and SSIM for training's validation, and all that ``drorae evaluate`` does."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from kernels.dispatch import FusionSetting
from model.images.similarity import psnr, ssim
from model.tokenizer import LatentKind, Tokenizer
from training.data.batches import evaluation_batches
from training.data.passes import RANKS_TIMEOUT_S, SAVE_EVERY_S, PassConfig, default_workers
from training.data.shards import ShardStore, listing_sha256
from training.data.sources import Sample, list_samples, spread_samples
from training.distributed.device import resolve_device
from training.distributed.ranks import Ranks, current, process_group
from training.errors import DataError
from training.evaluation.autoencoders import Autoencoder, DiffusersAutoencoder
from training.evaluation.quality import Metrics, WeightFiles, measure_quality
from training.evaluation.readout import fit_readouts
from training.evaluation.report import Report, write_report

logger = logging.getLogger(__name__)

STATE_FOLDER = ".unfinished"


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
    samples: Sequence[Sample],
    batch_size: int = 25,
    latent: LatentKind = "enriched",
    num_pictures: int = 8,
    progress: bool = True,
) -> Evaluation:
    """Reconstruct every listed image, centre-cropped to the tokenizer's size.

    Raises:
        DataError: no image can be decoded.
    """
    per_image: list[tuple[str, float, float]] = []
    pictures: list[tuple[Tensor, Tensor]] = []
    num_broken = 0
    with tqdm(total=len(samples), unit="image", desc="evaluate", disable=not progress) as bar:
        for kept, batch in evaluation_batches(samples, tokenizer.config.image_size, batch_size):
            images = batch.pixels(tokenizer.device)
            reconstructions = tokenizer.reconstruct(images, latent).float()
            figures = zip(
                psnr(reconstructions, images).tolist(), ssim(reconstructions, images).tolist(), strict=True
            )
            per_image += [(sample.key, *pair) for sample, pair in zip(kept, figures, strict=True)]
            pictures += list(zip(images.cpu(), reconstructions.cpu(), strict=True))[
                : num_pictures - len(pictures)
            ]
            num_broken += batch.num_broken
            bar.update(len(kept) + batch.num_broken)
    if not per_image:
        raise DataError(f"none of the {len(samples)} images could be decoded")
    originals, decoded = (torch.stack(column) for column in zip(*pictures, strict=True))
    return Evaluation(
        psnr_db=sum(row[1] for row in per_image) / len(per_image),
        ssim=sum(row[2] for row in per_image) / len(per_image),
        per_image=per_image,
        num_broken=num_broken,
        originals=originals,
        reconstructions=decoded,
    )


@dataclass(frozen=True)
class EvaluationOptions:
    """Options of ``drorae evaluate``; see its help.

    Attributes:
        latents: to reconstruct by way of; None for the enriched one, or what the checkpoint has.
        metrics: names of `training.evaluation.quality.METRICS`; None for every one whose weights are here.
        readout_photos: folders or shards on which linear readouts are fitted; None for no readout.
        limit: images used at most, spread over the data; None for all.
        num_workers: processes that decode images; None for what suits the device.
        save_every_s: how often unfinished work is kept, seconds.
        autoencoder: folder of a diffusers autoencoder to evaluate instead of the checkpoint.
        image_size: of the images that it takes, pixels; None for its own, or 256.
    """

    checkpoint: str
    data: list[Path]
    output: Path | None = None
    latents: tuple[LatentKind, ...] | None = None
    metrics: tuple[str, ...] | None = None
    weights: WeightFiles = field(default_factory=WeightFiles)
    readout_photos: list[Path] | None = None
    limit: int | None = None
    batch_size: int = 25
    device: str = "auto"
    fusion: FusionSetting = "auto"
    num_workers: int | None = None
    save_every_s: float = SAVE_EVERY_S
    autoencoder: Path | None = None
    image_size: int | None = None


def evaluate_command(options: EvaluationOptions) -> int:
    """``drorae evaluate``: prints the figures as JSON; with an output folder writes the whole report.

    A run that was cut off goes on, on any number of ranks: its work so far is in the output folder.

    Raises:
        TrainingError, model.errors.ModelError: one sentence that names what is at fault.
    """
    with process_group(options.device, RANKS_TIMEOUT_S):
        return _run_evaluation(options, current())


def _run_evaluation(options: EvaluationOptions, ranks: Ranks) -> int:
    device = resolve_device(options.device)
    tokenizer: Autoencoder
    readouts = None
    latents: tuple[LatentKind, ...] = ("base",)
    if options.autoencoder is not None:
        tokenizer = DiffusersAutoencoder(options.autoencoder, device, options.image_size)
    else:
        tokenizer = own = Tokenizer.load(options.checkpoint, device=device, fusion=options.fusion)
        latents = _choose_latents(own, options.latents)
        readouts = fit_readouts(own, options.readout_photos, latents) if options.readout_photos else None
    assert tokenizer.checkpoint is not None
    metrics = Metrics(options.metrics, options.weights, tokenizer, readouts)
    listing = list_samples(options.data, ranks)
    samples = spread_samples(listing, options.limit)
    workers = default_workers(tokenizer.device) if options.num_workers is None else options.num_workers
    config = PassConfig(
        tokenizer.config.image_size, options.batch_size, "evaluate", workers, options.save_every_s
    )
    identity = {
        "checkpoint": tokenizer.checkpoint.sha256,
        "data": listing_sha256(samples),
        "readout_photos": [str(path) for path in options.readout_photos or ()],
        "latents": latents,
        "metrics": [*metrics.columns, *(network.column for network in metrics.networks)],
    }
    store = ShardStore(options.output and options.output / STATE_FOLDER, identity)
    quality = measure_quality(tokenizer, samples, latents, metrics, config, store, ranks)
    if ranks.is_main:
        report = Report(tokenizer, samples, metrics, quality, listing.left_out)
        if options.output is not None:
            write_report(report, options.output)
            store.remove()
        print(report.json())  # noqa: T201 - the command's own output
    return 0


def _choose_latents(tokenizer: Tokenizer, wanted: tuple[LatentKind, ...] | None) -> tuple[LatentKind, ...]:
    if tokenizer.fusion is not None:
        return wanted or ("enriched",)
    if wanted is not None and "enriched" in wanted:
        raise DataError(
            f"checkpoint {tokenizer.config.name!r} has no fusion, so no enriched latents: use base"
        )
    return ("base",)
