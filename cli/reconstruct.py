"""``drorae reconstruct``: photos through the tokenizer and back.

Shape legend: B batch, S image side.
"""

import argparse
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from cli import files
from cli.errors import EXIT_FAILED, EXIT_OK, CommandError, UsageError
from cli.options import MODEL_FIELDS, Subparsers, add_command, add_settings, read_settings
from model.metrics import psnr, ssim
from service.decoding import ImageRules
from service.devices import load_tokenizer

EXAMPLES = """\
  drorae reconstruct photo.jpg out.png
  drorae reconstruct photos/ out/
  drorae reconstruct --latent base --fit pad photo.jpg last-layer-only.png
"""


@dataclass
class Tally:
    """Figures of the photos that worked, and how many did not."""

    psnr_db: list[float] = field(default_factory=list)
    ssim: list[float] = field(default_factory=list)
    num_skipped: int = 0


def add_parser(subparsers: Subparsers) -> None:
    """Add the command."""
    parser = add_command(
        subparsers,
        "reconstruct",
        run,
        "photos to latents and back, with PSNR and SSIM",
        "Encode and decode a photo, or every photo of a folder, and print how close the result is to the\n"
        "fitted original: PSNR (higher is closer) and SSIM (1 is identical). A photo of a folder that\n"
        "cannot be read is skipped and named; the exit status is then 1.",
        EXAMPLES,
    )
    parser.add_argument("input", type=Path, metavar="IN", help="a photo, or a folder of photos")
    parser.add_argument(
        "output",
        type=Path,
        metavar="OUT",
        help="the picture (.png, .jpg, .webp); for a folder the folder of PNG pictures",
    )
    files.add_image_options(parser)
    add_settings(parser, MODEL_FIELDS)


def run(arguments: argparse.Namespace) -> int:
    """Reconstruct; 1 when a photo of a folder was skipped."""
    settings = read_settings(arguments)
    is_folder = arguments.input.is_dir()
    targets = _folder_targets(arguments) if is_folder else _single_target(arguments)
    tokenizer = load_tokenizer(settings)
    rules = files.image_rules(settings, tokenizer.config.image_size, arguments.fit)
    tally = Tally()
    for batch in files.batches(list(targets), settings.batch_size, "reconstruct"):
        photos = _read(batch, rules, tally, is_folder)
        if not photos:
            continue
        images_B3SS = torch.stack(list(photos.values()))
        pictures_B3SS = tokenizer.reconstruct(images_B3SS, arguments.latent).float().cpu()
        figures = zip(
            psnr(pictures_B3SS, images_B3SS).tolist(), ssim(pictures_B3SS, images_B3SS).tolist(), strict=True
        )
        for path, pixels, (decibels, similarity) in zip(photos, pictures_B3SS, figures, strict=True):
            targets[path].parent.mkdir(parents=True, exist_ok=True)
            files.write_picture_file(targets[path], pixels)
            tally.psnr_db.append(decibels)
            tally.ssim.append(similarity)
            tqdm.write(f"{path}: PSNR {decibels:.2f} dB, SSIM {similarity:.4f}", file=sys.stdout)
    return _summarize(tally, arguments.input) if is_folder else EXIT_OK


def _single_target(arguments: argparse.Namespace) -> dict[Path, Path]:
    source, target = arguments.input, arguments.output
    if not source.exists():
        raise UsageError(f"{source}: No such file or directory")
    if target.is_dir():
        target = target / f"{source.stem}{files.DEFAULT_PICTURE_SUFFIX}"
    files.check_output_file(target, files.PICTURE_FORMATS)
    if target.exists() and os.path.samefile(source, target):
        raise UsageError(f"{target}: the output would replace the input")
    return {source: target}


def _folder_targets(arguments: argparse.Namespace) -> dict[Path, Path]:
    source, target = arguments.input, arguments.output
    if target.suffix.lower() in files.PICTURE_FORMATS or target.is_file():
        raise UsageError(f"{target}: the input is a folder, so the output must be one too")
    if target.exists() and os.path.samefile(source, target):
        raise UsageError(f"{target}: the output folder is the input folder")
    photos = files.find_photos(source, excluded=target)
    files.make_folder(target)
    plain = {path: path.relative_to(source).with_suffix(files.DEFAULT_PICTURE_SUFFIX) for path in photos}
    uses = Counter(plain.values())
    # a.jpg and a.png side by side would both become a.png.
    full = {
        path: path.relative_to(source).with_name(path.name + files.DEFAULT_PICTURE_SUFFIX) for path in photos
    }
    return {path: target / (plain[path] if uses[plain[path]] == 1 else full[path]) for path in photos}


def _read(paths: Sequence[Path], rules: ImageRules, tally: Tally, skips_broken: bool) -> dict[Path, Tensor]:
    photos = {}
    for path in paths:
        try:
            photos[path] = files.read_photo(path, rules)
        except UsageError as exc:
            if not skips_broken:
                raise
            tally.num_skipped += 1
            tqdm.write(f"drorae: skipped {exc}", file=sys.stderr)
    return photos


def _summarize(tally: Tally, folder: Path) -> int:
    count = len(tally.psnr_db)
    if not count:
        raise CommandError(f"{folder}: none of the {tally.num_skipped} photos could be read")
    mean_psnr, mean_ssim = sum(tally.psnr_db) / count, sum(tally.ssim) / count
    skipped = f", {tally.num_skipped} skipped" if tally.num_skipped else ""
    print(f"mean of {count} photos{skipped}: PSNR {mean_psnr:.2f} dB, SSIM {mean_ssim:.4f}")
    return EXIT_FAILED if tally.num_skipped else EXIT_OK
