"""Where training images come from: folders and tar shards, listed once and read on demand."""

import logging
import os
import tarfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.errors import DataError

logger = logging.getLogger(__name__)

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"})
TAR_SUFFIXES = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Sample:
    """One listed image: where its bytes are, and its class where the source names one.

    Attributes:
        key: name for messages and file names.
        file: the image file, or the shard that holds it.
        offset, num_bytes: place in an uncompressed shard; None for a file of its own.
        data: the bytes, for members of compressed shards, which have no random access.
        label: class index, or None.
    """

    key: str
    file: Path
    offset: int | None = None
    num_bytes: int | None = None
    data: bytes | None = None
    label: int | None = None

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


def list_samples(paths: Sequence[Path]) -> list[Sample]:
    """List every image of folders (recursively) and WebDataset tar shards, in a stable order.

    Args:
        paths: folders, ``.tar``, ``.tar.gz`` or ``.tgz`` files. A folder may itself hold shards.

    Raises:
        DataError: a path is missing or unreadable, or there is no image at all.
    """
    samples = [sample for path in paths for sample in _list_one(expand_path(path))]
    if not samples:
        raise DataError(f"no images in {', '.join(str(path) for path in paths)}")
    return samples


def expand_path(path: Path) -> Path:
    """Replace ``~`` and environment variables such as ``$DRORAE_DATA``.

    Raises:
        DataError: the variable is not set.
    """
    expanded = os.path.expandvars(path.expanduser())
    if "$" in expanded:
        raise DataError(f"{path}: set the environment variable that it names")
    return Path(expanded)


def _list_one(path: Path) -> Iterable[Sample]:
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        for file in files:
            if file.name.endswith(TAR_SUFFIXES):
                yield from _list_shard(file)
            elif file.suffix.lower() in IMAGE_SUFFIXES:
                yield Sample(key=str(file.relative_to(path).with_suffix("")), file=file)
    elif path.is_file() and path.name.endswith(TAR_SUFFIXES):
        yield from _list_shard(path)
    elif path.exists():
        raise DataError(f"{path} is neither a folder nor a tar shard")
    else:
        raise DataError(f"{path} does not exist")


def _list_shard(file: Path) -> list[Sample]:
    """Members that share the name before the first dot are one sample (WebDataset)."""
    images: dict[str, Sample] = {}
    labels: dict[str, int] = {}
    try:
        with tarfile.open(file) as shard:
            compressed = not file.name.endswith(".tar")
            for member in shard:
                folder, name = os.path.split(member.name)
                stem, _, suffix = name.partition(".")
                key = os.path.join(folder, stem)
                if not member.isfile():
                    continue
                if suffix == "cls":
                    labels[key] = int(_read_member(shard, member))
                elif f".{suffix.lower()}" in IMAGE_SUFFIXES:
                    data = _read_member(shard, member) if compressed else None
                    images[key] = Sample(key, file, member.offset_data, member.size, data)
    except (tarfile.TarError, OSError, EOFError, ValueError) as exc:
        raise DataError(f"{file}: not a readable tar shard: {exc}") from exc
    return [
        Sample(s.key, s.file, s.offset, s.num_bytes, s.data, labels.get(key)) for key, s in images.items()
    ]


def _read_member(shard: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    stream = shard.extractfile(member)
    assert stream is not None, "regular files have contents"
    return stream.read()
