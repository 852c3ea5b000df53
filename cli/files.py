"""Files in and out for the commands: photos found and read, results written whole or not at all."""

import argparse
import os
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor
from tqdm import tqdm

from cli.errors import CommandError, UsageError, os_error_sentence
from model.pictures import Fit
from model.pixels import to_unit
from service.decoding import ImageRules
from service.errors import ServiceError
from service.images import PictureFormat, read_image, write_picture
from service.settings import Settings

PHOTO_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
PICTURE_FORMATS: Mapping[str, PictureFormat] = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
}
DEFAULT_PICTURE_SUFFIX = ".png"
FITS = ("crop", "pad", "stretch")


def add_image_options(parser: argparse.ArgumentParser) -> None:
    """The flags of every command that encodes photos: ``--latent`` and ``--fit``."""
    parser.add_argument(
        "--latent",
        choices=("enriched", "base"),
        default="enriched",
        help="the latent fused over the layers (default), or the encoder's last layer alone",
    )
    parser.add_argument(
        "--fit",
        choices=FITS,
        default="crop",
        help="how a photo becomes square: cropped (default), padded with white, or stretched",
    )


def image_rules(settings: Settings, side: int, fit: Fit) -> ImageRules:
    """The service's rules for images, at the model's size."""
    return ImageRules(side, settings.max_image_pixels, settings.max_aspect_ratio, fit, settings.max_frames)


def find_photos(folder: Path, excluded: Path | None = None) -> list[Path]:
    """Photos of a folder and its subfolders by their suffix, sorted.

    Args:
        folder: where to look.
        excluded: a subfolder to leave out, such as the one that results go to.

    Raises:
        UsageError: there are none.
    """
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in PHOTO_SUFFIXES
        and path.is_file()
        and (excluded is None or not path.is_relative_to(excluded))
    )
    if not found:
        raise UsageError(f"{folder}: no photos in this folder ({', '.join(sorted(PHOTO_SUFFIXES))})")
    return found


def read_file(path: Path) -> bytes:
    """The bytes of an input file.

    Raises:
        UsageError: it is missing, a folder, or not readable.
    """
    try:
        return path.read_bytes()
    except OSError as exc:
        raise UsageError(os_error_sentence(exc)) from exc


def read_photo(path: Path, rules: ImageRules) -> Tensor:
    """An image file to [3, S, S] float32 in [0, 1], exactly as the service reads it.

    Raises:
        UsageError: it cannot be read or is no image; names the file.
    """
    data = read_file(path)
    try:
        return to_unit(read_image(data, rules))
    except ServiceError as exc:
        raise UsageError(f"{path}: {exc.detail}") from exc


def write_picture_file(path: Path, pixels: Tensor) -> None:
    """[3, S, S] in [0, 1] to an image file of the format that its suffix names.

    Raises:
        CommandError: it cannot be written.
    """
    write_file(path, write_picture(pixels, PICTURE_FORMATS[path.suffix.lower()]))


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole or leave what was there; a device or pipe is written to as it is.

    Raises:
        CommandError: it cannot be written.
    """
    direct = path.exists() and not path.is_file()
    target = path if direct else path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
    try:
        target.write_bytes(data)
        if not direct:
            os.replace(target, path)
    except OSError as exc:
        raise CommandError(f"{path}: cannot be written: {exc.strerror or exc}") from exc
    finally:
        if not direct:
            target.unlink(missing_ok=True)


def check_output_file(path: Path, suffixes: Sequence[str] | Mapping[str, PictureFormat]) -> None:
    """Refuse an output file before the model works for it.

    Raises:
        UsageError: its suffix names no format.
        CommandError: its folder is missing or not writable.
    """
    if path.suffix.lower() not in suffixes:
        raise UsageError(f"{path}: the name of the output must end in one of {', '.join(suffixes)}")
    if path.is_dir():
        raise UsageError(f"{path} is a folder, and a file is to be written")
    if not path.parent.is_dir():
        raise CommandError(f"{path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise CommandError(f"{path}: cannot be written: Permission denied")


def make_folder(path: Path) -> None:
    """Create an output folder where it is missing.

    Raises:
        CommandError: it cannot be created or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise CommandError(f"{path}: cannot be made a folder: {exc.strerror or exc}") from exc
    if not os.access(path, os.W_OK):
        raise CommandError(f"{path}: cannot be written: Permission denied")


def check_new_folder(path: Path) -> None:
    """Refuse an output directory that holds something, before anything is read for it.

    Raises:
        UsageError: a file or a folder that is not empty is there.
        CommandError: its parent is not writable.
    """
    if path.exists() and not path.is_dir():
        raise UsageError(f"{path} is a file, and a folder is to be written")
    if path.is_dir() and any(path.iterdir()):
        raise UsageError(f"{path}: the folder is not empty; name a new one, or remove it first")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    if not os.access(parent, os.W_OK):
        raise CommandError(f"{path}: cannot be written: Permission denied")


def batches(items: Sequence[Path], batch_size: int, title: str) -> Iterator[Sequence[Path]]:
    """Items in batches, with a progress bar where a person watches and there is more than one."""
    hidden = not sys.stderr.isatty() or len(items) < 2
    with tqdm(total=len(items), desc=title, unit="photo", file=sys.stderr, disable=hidden) as bar:
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            yield batch
            bar.update(len(batch))
