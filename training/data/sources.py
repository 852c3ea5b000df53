"""Where images come from: folders and tar shards, listed once and read on demand.

The commands on files and training list by the same rules. Nothing is dropped without a word: a listing
counts what it leaves out, by the reason.
"""

import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import overload

from training.data.index import SUFFIX as INDEX_SUFFIX
from training.data.index import read_index, write_index
from training.data.names import (
    DANGLING,
    HIDDEN,
    LISTED_ALREADY,
    NOT_A_FILE,
    NOT_AN_IMAGE,
    UNREADABLE,
    is_tar,
    printable,
    reason_to_leave_out,
)
from training.data.tars import is_compressed, list_members
from training.distributed.ranks import Ranks
from training.errors import DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sample:
    """One listed image: where its bytes are, and its class where the source names one.

    Attributes:
        key: name for messages and reports, printable.
        file: the image file, or the shard that holds it.
        offset, num_bytes: place in an uncompressed shard; None for a file of its own.
        data: the bytes, for members of compressed shards, which have no random access.
        label: class index, or None.
        is_packed: whether ``offset`` counts in what a compressed shard unpacks to, as its bytes were not
            kept.
    """

    key: str
    file: Path
    offset: int | None = None
    num_bytes: int | None = None
    data: bytes | None = None
    label: int | None = None
    is_packed: bool = False

    @property
    def file_name(self) -> str:
        """Name of the file, printable."""
        return printable(self.file.name)

    @property
    def is_member(self) -> bool:
        """Whether the image is a member of a shard."""
        return self.offset is not None or self.data is not None

    def read(self) -> bytes:
        """The encoded image.

        Raises:
            OSError: the file vanished or cannot be read.
        """
        if self.data is not None:
            return self.data
        if self.offset is None or self.num_bytes is None:
            return self.file.read_bytes()
        with self.file.open("rb") as stream:
            return os.pread(stream.fileno(), self.num_bytes, self.offset)


@dataclass(frozen=True)
class Listing(Sequence[Sample]):
    """Listed images, in a stable order, and what was left out.

    Attributes:
        samples: the images.
        left_out: numbers of files, folders and members by the reason why they are not among the images.
    """

    samples: list[Sample]
    left_out: Counter[str] = field(default_factory=Counter)

    @overload
    def __getitem__(self, index: int) -> Sample: ...
    @overload
    def __getitem__(self, index: slice) -> list[Sample]: ...
    def __getitem__(self, index: int | slice) -> Sample | list[Sample]:
        return self.samples[index]

    def __len__(self) -> int:
        return len(self.samples)

    @property
    def lacks_photos(self) -> bool:
        """Whether something that was left out may be a photo."""
        return bool(self.left_out.keys() - {NOT_AN_IMAGE, HIDDEN})

    def summary(self) -> str:
        """The numbers in words."""
        reasons = [f"{count} x {reason}" for reason, count in sorted(self.left_out.items())]
        left_out = f"; left out {self.left_out.total()}: {', '.join(reasons)}" if reasons else ""
        return f"listed {len(self.samples)} images{left_out}"


def list_images(paths: Sequence[Path], keep_data: bool = True) -> Listing:
    """List every image of folders (recursively) and WebDataset tar shards, in a stable order.

    Args:
        paths: folders, ``.tar``, ``.tar.gz`` or ``.tgz`` files. A folder may itself hold shards.
        keep_data: whether members of compressed shards come with their bytes.

    Raises:
        DataError: a path is missing or unreadable.
    """
    left_out: Counter[str] = Counter()
    samples: list[Sample] = []
    for path in map(expand_path, paths):
        found, ignored = _from_index(path) or _list_one(path, keep_data)
        samples += found
        left_out += ignored
    return Listing(samples, left_out)


def list_samples(paths: Sequence[Path], ranks: Ranks = Ranks()) -> Listing:  # noqa: B008 - frozen
    """List images as `list_images` does; the log says what was left out, as a warning if it may be photos.

    Args:
        paths: as for `list_images`.
        ranks: rank 0 lists, and gives the others its listing; collective.

    Raises:
        DataError: a path is missing or unreadable, or there is no image at all.
    """
    return ranks.on_main(lambda: _list_and_log(paths))


def _list_and_log(paths: Sequence[Path]) -> Listing:
    listing = list_images(paths)
    places = ", ".join(printable(str(path)) for path in paths)
    if not listing:
        raise DataError(f"no images in {places}: {listing.summary()}")
    if listing.left_out:
        level = logging.WARNING if listing.lacks_photos else logging.INFO
        logger.log(level, "%s: %s", places, listing.summary())
    return listing


def spread_samples(samples: Sequence[Sample], limit: int | None) -> list[Sample]:
    """At most ``limit`` of the samples, spread evenly over the list; all of them without a limit."""
    if limit is None or limit >= len(samples):
        return list(samples)
    return [samples[index * len(samples) // limit] for index in range(limit)]


def expand_path(path: Path) -> Path:
    """Replace ``~`` and environment variables such as ``$DRORAE_DATA`` where no file has that very name.

    Raises:
        DataError: the variable is not set.
    """
    if path.exists():
        return path
    expanded = os.path.expandvars(path.expanduser())
    if "$" in expanded:
        raise DataError(f"{path}: set the environment variable that it names")
    return Path(expanded)


def _from_index(path: Path) -> tuple[list[Sample], Counter[str]] | None:
    found = read_index(path)
    if found is None:
        return None
    rows, left_out = found
    samples = [
        Sample(key, path / name, offset, num_bytes, label=label)
        for name, key, offset, num_bytes, label in rows
    ]
    return samples, left_out


def _list_one(path: Path, keep_data: bool) -> tuple[list[Sample], Counter[str]]:
    """Images of a folder or tar, and what was left out; keeps its index up to date where there is one."""
    left_out: Counter[str] = Counter()
    places: list[Path] = []
    if path.is_dir():
        samples = list(_list_folder(path, places, left_out, keep_data))
    elif path.is_file() and is_tar(path):
        places.append(path)
        samples = list_shard(path, left_out, keep_data)
    elif path.exists():
        raise DataError(f"{path} is neither a folder nor a tar shard")
    else:
        raise DataError(f"{path} does not exist")
    if all(sample.data is None and not sample.is_packed for sample in samples):
        rows = [(str(s.file.relative_to(path)), s.key, s.offset, s.num_bytes, s.label) for s in samples]
        write_index(path, places, rows, left_out)
    return samples, left_out


def _list_folder(
    folder: Path, places: list[Path], left_out: Counter[str], keep_data: bool
) -> Iterator[Sample]:
    files = sorted(_walk(folder, places, left_out))
    images = [file for file in files if not is_tar(file)]
    keys = dict(zip(images, short_names([str(file.relative_to(folder)) for file in images]), strict=True))
    for file in files:
        if is_tar(file):
            places.append(file)
            yield from list_shard(file, left_out, keep_data)
        else:
            yield Sample(keys[file], file)


def list_shard(file: Path, left_out: Counter[str], keep_data: bool) -> list[Sample]:
    """The images of a tar, with keys that tell them apart; the rest as `list_members`."""
    members = list_members(file, left_out, keep_data)
    is_packed = not keep_data and is_compressed(file)
    keys = short_names([member.name for member in members])
    return [
        Sample(key, file, member.offset, member.num_bytes, member.data, member.label, is_packed)
        for key, member in zip(keys, members, strict=True)
    ]


def short_names(names: Sequence[str]) -> list[str]:
    """Names without their suffixes, where that is enough to tell them apart."""
    stems = [os.path.splitext(name)[0] for name in names]
    uses = Counter(stems)
    return [printable(stem if uses[stem] == 1 else name) for stem, name in zip(stems, names, strict=True)]


def _walk(folder: Path, places: list[Path], left_out: Counter[str]) -> Iterator[Path]:
    """Images and shards of a folder and all below it, each folder once: by its own name before links.

    The folders that were read are added to ``places``.
    """
    seen: set[tuple[int, int]] = set()
    folders, links = [folder], list[Path]()
    while folders or links:
        is_link = not folders
        current = links.pop(0) if is_link else folders.pop()
        try:
            status = current.stat()
            if (status.st_dev, status.st_ino) in seen:
                if is_link:
                    left_out[LISTED_ALREADY] += 1
                continue
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
            places.append(current)
        except OSError:
            left_out[UNREADABLE] += 1
            continue
        for entry in entries:
            if os.path.isdir(entry) if entry.is_symlink() else entry.is_dir():
                (links if entry.is_symlink() else folders).append(Path(entry.path))
            elif (reason := _reason_of_entry(entry)) is None:
                yield Path(entry.path)
            elif not entry.name.endswith(INDEX_SUFFIX):
                left_out[reason] += 1


def _reason_of_entry(entry: os.DirEntry[str]) -> str | None:
    """Why an entry that is no folder is left out; None for an image or a shard."""
    if entry.is_symlink() and not os.path.exists(entry):  # whatever its name: it may have been a folder
        return DANGLING
    reason = None if is_tar(Path(entry.name)) else reason_to_leave_out(entry.name)
    return NOT_A_FILE if reason is None and not os.path.isfile(entry) else reason
