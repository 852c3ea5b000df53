"""``drorae reconstruct``: photos through the tokenizer and back.

Shape legend: B batch, S image side.
"""

import argparse
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cli import files
from cli.errors import UsageError
from cli.options import MODEL_FIELDS, Subparsers, add_command, add_settings, read_settings
from model.images.similarity import psnr, ssim
from service.engine.devices import load_tokenizer

if TYPE_CHECKING:
    from training.data.sources import Sample

EXAMPLES = """\
  drorae reconstruct photo.jpg out.png
  drorae reconstruct photos/ out/
  drorae reconstruct --latent base --fit pad photo.jpg last-layer-only.png
  drorae reconstruct - - < photo.jpg > out.png
"""


@dataclass
class Tally:
    """Figures of the photos that could be read."""

    psnr_db: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "reconstruct",
        run,
        "photos to latents and back, with PSNR and SSIM",
        "Encode and decode a photo, or every photo of a folder or tar, and print how close the result is to\n"
        "the fitted original: PSNR (higher is closer) and SSIM (1 is identical). A photo of several that\n"
        "cannot be read is skipped and named; the exit status is then 3.",
        EXAMPLES,
    )
    parser.add_argument(
        "input", type=Path, metavar="IN", help="a photo, a folder or tar of them; - for stdin"
    )
    parser.add_argument(
        "output",
        type=Path,
        metavar="OUT",
        help="the picture (.png, .jpg, .webp; - for PNG on stdout); for several the folder of PNG pictures",
    )
    files.add_image_options(parser)
    add_settings(parser, MODEL_FIELDS)


def run(arguments: argparse.Namespace) -> int:
    """Reconstruct; 3 when some photos could not be read."""
    from cli import photos  # with training's listing, which serving does not need

    settings = read_settings(arguments)
    is_folder = photos.is_collection(arguments.input)
    targets = _folder_targets(arguments) if is_folder else _single_target(arguments)
    tokenizer = load_tokenizer(settings)
    rules = files.image_rules(settings, tokenizer.config.image_size, arguments.fit)
    reader = photos.PhotoReader(rules, has_several=is_folder)
    tally = Tally()
    for samples, images_B3SS in reader.batches(list(targets), settings.batch_size, "reconstruct"):
        pictures_B3SS = tokenizer.reconstruct(images_B3SS, arguments.latent).float().cpu()
        figures = zip(
            psnr(pictures_B3SS, images_B3SS).tolist(), ssim(pictures_B3SS, images_B3SS).tolist(), strict=True
        )
        for sample, pixels, (decibels, similarity) in zip(samples, pictures_B3SS, figures, strict=True):
            target = targets[sample]
            if target != files.STANDARD_STREAM:
                target.parent.mkdir(parents=True, exist_ok=True)
            files.write_picture_file(target, pixels)
            tally.psnr_db.append(decibels)
            tally.ssim.append(similarity)
            files.say(f"{photos.shown(sample)}: PSNR {decibels:.2f} dB, SSIM {similarity:.4f}", target)
    if is_folder:
        print(_summary(tally, reader.num_broken))
    return reader.status


def _single_target(arguments: argparse.Namespace) -> "dict[Sample, Path]":
    from cli import photos

    source, target = arguments.input, arguments.output
    is_stream = source == files.STANDARD_STREAM
    if not is_stream and not source.exists():
        raise UsageError(f"{source}: No such file or directory")
    if target.is_dir():
        target = target / f"{'stdin' if is_stream else source.stem}{files.DEFAULT_PICTURE_SUFFIX}"
    files.check_output_file(target, files.PICTURE_FORMATS)
    if not is_stream and target.exists() and os.path.samefile(source, target):
        raise UsageError(f"{target}: the output would replace the input")
    return {photos.single_photo(source): target}


def _folder_targets(arguments: argparse.Namespace) -> "dict[Sample, Path]":
    from cli import photos

    source, target = arguments.input, arguments.output
    if target == files.STANDARD_STREAM or target.suffix.lower() in files.PICTURE_FORMATS or target.is_file():
        raise UsageError(f"{target}: the input is a folder (or a tar), so the output must be one too")
    if target.exists() and os.path.samefile(source, target):
        raise UsageError(f"{target}: the output folder is the input folder")
    samples = photos.find_photos(source, excluded=target)
    files.make_folder(target)
    suffix = files.DEFAULT_PICTURE_SUFFIX
    return {sample: target / f"{photos.output_name(sample, source)}{suffix}" for sample in samples}


def _summary(tally: Tally, num_skipped: int) -> str:
    count = len(tally.psnr_db)
    mean_psnr, mean_ssim = sum(tally.psnr_db) / count, sum(tally.ssim) / count
    skipped = f", {num_skipped} skipped" if num_skipped else ""
    return f"mean of {count} photos{skipped}: PSNR {mean_psnr:.2f} dB, SSIM {mean_ssim:.4f}"
