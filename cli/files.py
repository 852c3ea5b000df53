"""Files in and out for the commands: results are written whole or not at all."""

import argparse
import os
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from torch import Tensor
from tqdm import tqdm

from cli.errors import CommandError, UsageError, os_error_sentence
from model.images.files import Fit
from service.codecs.images import PictureFormat, write_picture
from service.photos.decode import ImageRules
from service.settings import Settings

T = TypeVar("T")

STANDARD_STREAM = Path("-")
"""As an input standard input, as an output standard output."""
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


def read_file(path: Path) -> bytes:
    """The bytes of an input file, or of standard input.

    Raises:
        UsageError: it is missing, a folder, or not readable.
    """
    try:
        return read_standard_input() if path == STANDARD_STREAM else path.read_bytes()
    except OSError as exc:
        raise UsageError(os_error_sentence(exc)) from exc


def read_standard_input() -> bytes:
    """All of standard input.

    Raises:
        UsageError: the caller closed it.
    """
    if sys.stdin is None:
        raise UsageError("-: standard input is closed")
    return sys.stdin.buffer.read()


def write_picture_file(path: Path, pixels: Tensor) -> None:
    """[3, S, S] in [0, 1] to an image file of the format that its suffix names; PNG to standard output.

    Raises:
        CommandError: it cannot be written.
    """
    suffix = DEFAULT_PICTURE_SUFFIX if path == STANDARD_STREAM else path.suffix.lower()
    write_file(path, write_picture(pixels, PICTURE_FORMATS[suffix]))


def write_file(path: Path, data: bytes) -> None:
    """Write a file whole, or leave the old one; a device or pipe is written to as it is.

    Raises:
        CommandError: it cannot be written.
    """
    if path == STANDARD_STREAM:
        _write_standard_output(data)
        return
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


def _write_standard_output(data: bytes) -> None:
    try:
        sys.stdout.buffer.write(data)
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError as exc:
        raise CommandError(f"standard output: cannot be written: {exc.strerror or exc}") from exc


def say(text: str, output: Path) -> None:
    """Print a result for people: to standard error where the output itself goes to standard output."""
    tqdm.write(text, file=sys.stderr if output == STANDARD_STREAM else sys.stdout)


def check_output_file(path: Path, suffixes: Sequence[str] | Mapping[str, PictureFormat]) -> None:
    """Refuse an output file before the model works for it.

    Raises:
        UsageError: its suffix names no format.
        CommandError: its folder is missing or not writable.
    """
    if path == STANDARD_STREAM:
        if sys.stdout is None:
            raise UsageError("-: standard output is closed")
        if sys.stdout.isatty():
            raise UsageError("-: standard output is a terminal; send it to a file or another program")
        return
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


def batches(items: Sequence[T], batch_size: int, title: str, unit: str = "photo") -> Iterator[Sequence[T]]:
    """Items in batches, with a progress bar where a person watches and there is more than one."""
    hidden = not sys.stderr.isatty() or len(items) < 2
    with tqdm(total=len(items), desc=title, unit=unit, file=sys.stderr, disable=hidden) as bar:
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            yield batch
            bar.update(len(batch))
