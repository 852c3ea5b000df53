"""Photos for the commands: listed as training lists them, and read as the service reads them."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import torch
from torch import Tensor
from tqdm import tqdm

from cli.errors import EXIT_OK, EXIT_SOME_BROKEN, CommandError, UsageError, os_error_sentence
from cli.files import STANDARD_STREAM, batches, read_standard_input
from model.images.tensors import to_unit
from service.codecs.images import read_image
from service.errors import ServiceError
from service.photos.decode import ImageRules
from training.data.names import is_tar, printable
from training.data.sources import Sample, list_images
from training.errors import DataError


def expand_inputs(inputs: Sequence[Path]) -> list[Sample]:
    """The photos of files, folders and tars, in the order given; of standard input for ``-``.

    Raises:
        UsageError: one of them is missing, or holds no photos.
    """
    photos = []
    for path in inputs:
        if path != STANDARD_STREAM and not path.exists():
            raise UsageError(f"{path}: No such file or directory")
        photos += find_photos(path) if is_collection(path) else [single_photo(path)]
    return photos


def find_photos(source: Path, excluded: Path | None = None) -> list[Sample]:
    """Photos of a folder and its subfolders, or of a tar, listed as everywhere.

    Args:
        source: where to look.
        excluded: a subfolder to leave out, such as the one that results go to.

    Raises:
        UsageError: there are none, or the tar is damaged.
    """
    try:
        listing = list_images([source])
    except DataError as exc:
        raise UsageError(str(exc)) from exc
    found = [sample for sample in listing if excluded is None or not sample.file.is_relative_to(excluded)]
    if not found:
        raise UsageError(f"{source}: no photos in this folder: {listing.summary()}")
    if listing.lacks_photos:
        print(f"drorae: {source}: {listing.summary()}", file=sys.stderr)
    return found


def is_collection(path: Path) -> bool:
    """Whether an input holds several photos: a folder, or a tar."""
    return path.is_dir() or is_tar(path)


def single_photo(path: Path) -> Sample:
    """The photo of one file, or of standard input."""
    if path == STANDARD_STREAM:
        return Sample("standard input", path, data=read_standard_input())
    return Sample(str(path), path)


def shown(sample: Sample) -> str:
    """How messages call a photo."""
    if sample.file == STANDARD_STREAM or not sample.is_member:
        return sample.key if sample.file == STANDARD_STREAM else printable(str(sample.file))
    return f"{printable(str(sample.file))}: {sample.key}"


def short_name(sample: Sample) -> str:
    """Name of a photo in a file of latents: below its folder or tar, or that of its own file; no suffix."""
    is_single = sample.key == str(sample.file)
    return printable(sample.file.stem) if is_single else sample.key


def output_name(photo: Sample, source: Path) -> Path:
    """Name of a photo below its source, with its suffix where another photo differs in that alone.

    A tar is a folder, and no member's name leads out of it.
    """
    name = photo.file.relative_to(source)
    if photo.is_member:
        return name.joinpath(*(part for part in PurePosixPath(photo.key).parts if part not in ("/", "..")))
    return name if photo.key == printable(str(name)) else name.with_suffix("")


def read_photo(sample: Sample, rules: ImageRules) -> Tensor:
    """An image file to [3, S, S] float32 in [0, 1], bit by bit as training reads it.

    Raises:
        UsageError: it cannot be read or is no image; names the file.
    """
    try:
        return to_unit(read_image(sample.read(), rules))
    except OSError as exc:
        raise UsageError(os_error_sentence(exc)) from exc
    except ServiceError as exc:
        raise UsageError(f"{shown(sample)}: {exc.detail}") from exc


@dataclass
class PhotoReader:
    """Reads photos in batches; of several goes on after those that cannot be read, and counts them."""

    rules: ImageRules
    has_several: bool
    num_broken: int = 0

    def batches(
        self, photos: Sequence[Sample], batch_size: int, title: str
    ) -> Iterator[tuple[list[Sample], Tensor]]:
        """The photos that can be read, with their images [B, 3, S, S] float32 in [0, 1].

        Raises:
            UsageError: the only photo cannot be read.
            CommandError: none of several can be.
        """
        for batch in batches(photos, batch_size, title):
            samples, images = [], []
            for sample in batch:
                try:
                    images.append(read_photo(sample, self.rules))
                    samples.append(sample)
                except UsageError as exc:
                    if not self.has_several:
                        raise
                    self.num_broken += 1
                    tqdm.write(f"drorae: skipped {exc}", file=sys.stderr)
            if images:
                yield samples, torch.stack(images)
        if self.num_broken == len(photos):
            raise CommandError(f"none of the {len(photos)} photos could be read")

    @property
    def status(self) -> int:
        """The exit status of a command that is done with its photos."""
        return EXIT_SOME_BROKEN if self.num_broken else EXIT_OK
