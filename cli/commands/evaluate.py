"""``drorae evaluate``: reconstruction quality over folders or tars of photos."""

import argparse
from pathlib import Path

from cli.errors import CommandError, UsageError
from cli.options import (
    MODEL_FIELDS,
    Subparsers,
    add_command,
    add_photos,
    add_settings,
    add_workers,
    check_photos,
    positive_int,
    read_settings,
)
from model.tokenizer import LatentKind

EXAMPLES = """\
  drorae evaluate --data photos/
  drorae evaluate --autoencoder sd-vae-ft-mse/ --data photos-256-val.tar
  drorae evaluate --checkpoint runs/phase3/checkpoint --data photos-256-val.tar --latent both --output report/
  torchrun --nproc-per-node 8 --no-python drorae evaluate --data imagenet/val --output report/
"""
DESCRIPTION = """\
Reconstruct every photo and print the mean PSNR, SSIM, edge ratio and detail, LPIPS and rFID where
their weights are here, and a Frechet distance in EfficientNet-Lite0 features. With --readout-photos
also print what a linear map reads from the latents: enriched less base is what the fusion adds,
and the readout of a 3x3 neighbourhood is what a decoder has to beat. With --output also writes JSON, a
Markdown table, the figures of each photo as CSV, and a grid of the worst and best; a command that
was cut off then continues where it was when it is given again, on any number of ranks.
"""
METRICS = ("psnr", "ssim", "edge_ratio", "detail", "readout", "lpips", "frechet_efficientnet_lite0", "rfid")
LATENTS: dict[str, tuple[LatentKind, ...]] = {
    "base": ("base",),
    "enriched": ("enriched",),
    "both": ("base", "enriched"),
}


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers, "evaluate", run, "reconstruction quality over many photos", DESCRIPTION, EXAMPLES
    )
    add_photos(parser)
    parser.add_argument("--output", type=Path, metavar="DIR", help="also write the report here")
    parser.add_argument(
        "--autoencoder",
        type=Path,
        metavar="DIR",
        help="evaluate an autoencoder of diffusers instead (AutoencoderKL, AutoencoderRAE, ...)",
    )
    parser.add_argument(
        "--image-size",
        type=positive_int,
        metavar="S",
        help="side of the images that --autoencoder takes, pixels (default: its own, or 256)",
    )
    parser.add_argument(
        "--latent",
        choices=LATENTS,
        help="reconstruct from these latents (default: enriched, where there are any)",
    )
    parser.add_argument(
        "--metrics",
        metavar="NAME,...",
        help=f"of {', '.join(METRICS)} (default: all whose weights are here)",
    )
    parser.add_argument(
        "--readout-photos",
        type=Path,
        action="append",
        metavar="PATH",
        help="fit linear readouts on at most 300 of these photos, a folder or tar; may be repeated",
    )
    add_workers(parser)
    files = parser.add_argument_group("weight files", "by default looked for where their libraries keep them")
    files.add_argument("--inception-weights", type=Path, metavar="FILE", help="FID's Inception, for rfid")
    files.add_argument("--vgg-weights", type=Path, metavar="FILE", help="torchvision's VGG16, for lpips")
    files.add_argument("--lpips-weights", type=Path, metavar="FILE", help="LPIPS v0.1's vgg.pth, for lpips")
    add_settings(parser, MODEL_FIELDS)


def run(arguments: argparse.Namespace) -> int:
    """Evaluate; gives the evaluation's exit status."""
    settings = read_settings(arguments)
    check_photos(arguments.data)
    if arguments.readout_photos:
        check_photos(arguments.readout_photos)
    if arguments.output is not None and arguments.output.is_file():
        raise UsageError(f"{arguments.output} is a file: --output names a directory")
    _check_autoencoder(arguments)
    metrics = _read_metrics(arguments.metrics)
    try:
        from training.evaluation.evaluate import EvaluationOptions, evaluate_command
        from training.evaluation.quality import WeightFiles
    except ModuleNotFoundError as exc:
        raise CommandError(
            f"evaluation needs the package {exc.name!r}: pip install 'drorae[training]'"
        ) from exc
    return evaluate_command(
        EvaluationOptions(
            checkpoint=settings.checkpoint,
            data=arguments.data,
            output=arguments.output,
            latents=LATENTS[arguments.latent] if arguments.latent else None,
            metrics=metrics,
            weights=WeightFiles(arguments.vgg_weights, arguments.lpips_weights, arguments.inception_weights),
            readout_photos=arguments.readout_photos,
            limit=arguments.limit,
            batch_size=settings.batch_size,
            device=settings.device,
            fusion=settings.fusion,
            num_workers=arguments.workers,
            autoencoder=arguments.autoencoder,
            image_size=arguments.image_size,
        )
    )


def _check_autoencoder(arguments: argparse.Namespace) -> None:
    """Refuse flags that say something of checkpoints alone."""
    if arguments.autoencoder is None:
        if arguments.image_size is not None:
            raise UsageError("--image-size goes with --autoencoder: a checkpoint has its own")
        return
    given = {
        "--checkpoint": "setting_checkpoint" in arguments,
        "--latent": arguments.latent is not None,
        "--readout-photos": bool(arguments.readout_photos),
    }
    for flag, is_given in given.items():
        if is_given:
            raise UsageError(f"{flag} does not go with --autoencoder")
    if not arguments.autoencoder.is_dir():
        raise UsageError(f"{arguments.autoencoder}: there is no such folder")


def _read_metrics(text: str | None) -> tuple[str, ...] | None:
    if text is None:
        return None
    names = tuple(name.strip() for name in text.split(",") if name.strip())
    unknown = [name for name in names if name not in METRICS]
    if unknown or not names:
        raise UsageError(f"--metrics {text}: expected names of {', '.join(METRICS)}, separated by commas")
    return names
