"""Units of work: a slice of one input that gives exactly one file.

What a unit's file holds depends on the unit alone: its images make its own batches. So any number of
processes, machines and attempts gives the same bytes.
"""

import lzma
import zlib
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from itertools import groupby
from typing import IO, NamedTuple

from training.data.tars import open_unpacked
from training.latents.storage.inputs import Range, fetch
from training.latents.storage.places import as_place

NO_LABEL = -1


class UnitImage(NamedTuple):
    """One image of a unit.

    Attributes:
        key: the sample's name within its input, printable.
        path: the image file, or the tar that holds it; or its URL.
        offset, num_bytes: place in the tar, or in what a compressed one unpacks to; None for a file.
        label: class index, -1 for none.
    """

    key: str
    path: str
    offset: int | None
    num_bytes: int | None
    label: int = NO_LABEL


@dataclass(frozen=True)
class Unit:
    """A slice of one input. Small, and made of plain values: it travels to other processes and machines.

    Attributes:
        number: of the unit among all units of the job, from 0; names the file.
        input: name of the folder, tar or list.
        start: position of the first image within the input.
        images: in the input's order.
        is_compressed: whether the images' tar must be unpacked from its beginning.
    """

    number: int
    input: str
    start: int
    images: tuple[UnitImage, ...]
    is_compressed: bool = False

    @property
    def file_name(self) -> str:
        """Name of the unit's file in the output folder."""
        return f"latents-{self.number:06d}.safetensors"

    @property
    def keys(self) -> list[str]:
        """Names of all its images."""
        return [image.key for image in self.images]

    def __len__(self) -> int:
        return len(self.images)


def batch_starts(unit: Unit, batch_size: int) -> Sequence[int]:
    """Positions within the unit at which its batches begin."""
    return range(0, len(unit), batch_size)


def read_images(unit: Unit, start: int, stop: int) -> Iterator[bytes | str]:
    """The files of a unit's images from ``start`` to ``stop``, or why one cannot be read.

    A file is opened once for the images in a row that it holds. Images at URLs are fetched together.
    """
    for _, group in groupby(unit.images[start:stop], key=_source):
        waiting = list(group)
        path = waiting[0].path
        if "://" in path and not unit.is_compressed:
            yield from fetch([_range(image) for image in waiting])
            continue
        try:
            with open_input(path, unit.is_compressed) as stream:
                while waiting:
                    data = _read_image(stream, waiting[0])
                    waiting.pop(0)
                    yield data
        except OSError as exc:
            yield from (exc.strerror or str(exc) for _ in waiting)
        except (EOFError, zlib.error, lzma.LZMAError) as exc:
            yield from (f"its tar is damaged: {exc}" for _ in waiting)


def _source(image: UnitImage) -> str:
    """A file's path, or a URL's protocol."""
    protocol, is_url, _ = image.path.partition("://")
    return protocol if is_url else image.path


def open_input(path: str, is_compressed: bool) -> AbstractContextManager[IO[bytes]]:
    """A file to read, and to seek in; unpacked where it is a compressed tar.

    Raises:
        OSError: it cannot be read.
    """
    return open_unpacked(as_place(path)) if is_compressed else open(path, "rb")


def _range(image: UnitImage) -> Range:
    start = image.offset or 0
    return Range(image.path, image.offset, None if image.num_bytes is None else start + image.num_bytes)


def _read_image(stream: IO[bytes], image: UnitImage) -> bytes:
    if image.offset is None or image.num_bytes is None:
        return stream.read()
    stream.seek(image.offset)
    data = stream.read(image.num_bytes)
    if len(data) != image.num_bytes:
        raise EOFError(f"it ends within the image {image.key}")
    return data
