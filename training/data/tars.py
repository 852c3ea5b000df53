"""Tar shards as WebDataset writes them: members that share the name before the first dot are one sample."""

import bz2
import gzip
import json
import lzma
import posixpath
import re
import tarfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Self

from training.data.names import (
    COMPANION,
    DANGLING,
    FOLDER_LINK,
    NO_JSON,
    NOT_A_FILE,
    NOT_AN_IMAGE,
    REPLACED,
    SPARSE,
    printable,
    reason_to_leave_out,
)
from training.errors import DataError

LABEL_SUFFIX = ".cls"
JSON_SUFFIX = ".json"
_JSON_LABELS = ("label", "cls")
_MAX_JSON_BYTES = 2**20
_MAX_LABEL = 10**9
_LABEL = re.compile(rb"\s*[0-9]{1,9}\s*")
_MAX_LABEL_BYTES = 64
_MAX_LINKS = 16
_MIN_UNPACKED_BYTES = 64 * 2**20
_MAX_RATIO = 32
"""Between an unpacked shard, which is kept in memory, and its file. Images hardly become smaller."""
_COMPRESSED: dict[bytes, Callable[..., Any]] = {
    b"\x1f\x8b": gzip.open,
    b"BZh": bz2.open,
    b"\xfd7zXZ": lzma.open,
}
# What tarfile and the decompressors raise on damaged files; deeply nested headers end the stack.
_TAR_ERRORS = (
    tarfile.TarError,
    OSError,
    EOFError,
    ValueError,
    ArithmeticError,
    LookupError,
    TypeError,
    RecursionError,
    lzma.LZMAError,
    zlib.error,
)


@dataclass(frozen=True)
class Member:
    """An image in a shard.

    Attributes:
        name: as the shard writes it.
        offset, num_bytes: its place in the file, or in what a compressed file unpacks to.
        data: its bytes, where the shard is compressed and they are to be kept.
        label: class index, or None.
    """

    name: str
    offset: int
    num_bytes: int
    data: bytes | None
    label: int | None


@dataclass
class _Contents:
    """Contents of a shard by the members' normalised names, in their order.

    Attributes:
        names: of images and of links that may be some, as the shard writes them.
        places: offset, size and, of a compressed shard, the bytes of every file.
        links: the names that links lead to.
        labels: classes, by the file that states them.
    """

    names: dict[str, str] = field(default_factory=dict)
    places: dict[str, tuple[int, int, bytes | None]] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)
    labels: dict[str, int] = field(default_factory=dict)


class _StrictTarInfo(tarfile.TarInfo):
    """A header that must be whole: tarfile takes a damaged one for the end, and drops what follows."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> Self:
        try:
            member = super().frombuf(buf, encoding, errors)
        except tarfile.HeaderError as exc:
            if not any(buf):  # the end
                raise
            raise tarfile.ReadError(f"damaged header: {exc}") from exc
        if member.size < 0:
            raise tarfile.ReadError("a member of negative size")
        return member


class _Bounded:
    """A stream that ends in an error where it is longer than is plausible."""

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        self._stream = stream
        self._rest = limit

    def read(self, num_bytes: int) -> bytes:
        """Up to so many bytes.

        Raises:
            DataError: there are more than allowed.
        """
        data = self._stream.read(num_bytes)
        self._rest -= len(data)
        if self._rest < 0:
            raise DataError(f"it unpacks to more than {_MAX_RATIO} times its size: unpack it first")
        return data


def list_members(file: Path, left_out: Counter[str], keep_data: bool = True) -> list[Member]:
    """List the images of a shard, plain or compressed, as its first bytes say.

    A picture whose name has further dots belongs to the image without them, where there is one.

    Args:
        file: the shard.
        left_out: counts what is no image, by the reason.
        keep_data: whether members of a compressed shard come with their bytes; without, they take as much
            memory as others, and `open_unpacked` reads them.

    Raises:
        DataError: the shard is damaged, or a class is no number; names the shard.
    """
    try:
        with _open_tar(file) as (shard, is_packed):
            contents = _read_contents(shard, is_packed, keep_data, left_out)
    except DataError as exc:
        raise DataError(f"{file}: {exc}") from exc
    except _TAR_ERRORS as exc:
        raise DataError(f"{file}: not a readable tar shard: {exc}") from exc
    labels = _labels_of_samples(contents)
    members = []
    for name in _images(contents, left_out):
        place = contents.places.get(_target(contents, name))
        if place is None:
            left_out[DANGLING] += 1
        else:
            members.append(Member(contents.names[name], *place, labels.get(_sample_name(name))))
    return members


def is_compressed(file: Path) -> bool:
    """Whether a shard is compressed, as its first bytes say."""
    with file.open("rb") as stream:
        return _opener(stream) is not None


@contextmanager
def open_unpacked(file: Path) -> Iterator[IO[bytes]]:
    """A compressed shard as the tar that it unpacks to; seeking back unpacks it from its beginning again.

    Raises:
        OSError: it cannot be read.
    """
    with file.open("rb") as stream:
        opener = _opener(stream)
        if opener is None:
            yield stream
            return
        with opener(stream) as unpacked:
            yield unpacked


def _opener(stream: IO[bytes]) -> Callable[..., Any] | None:
    """What unpacks a file, as its first bytes say; None where it is not compressed."""
    start = stream.read(6)
    stream.seek(0)
    return next((opener for magic, opener in _COMPRESSED.items() if start.startswith(magic)), None)


@contextmanager
def _open_tar(file: Path) -> Iterator[tuple[tarfile.TarFile, bool]]:
    """The opened shard, and whether it is compressed; such a one is read once from beginning to end."""
    # Zeros end a tar, and further tars may follow: cat joins shards.
    options: dict[str, Any] = {"tarinfo": _StrictTarInfo, "ignore_zeros": True}
    with file.open("rb") as stream:
        opener = _opener(stream)
        if opener is None:
            with tarfile.open(fileobj=stream, mode="r:", **options) as shard:
                yield shard, False
            return
        limit = max(_MIN_UNPACKED_BYTES, _MAX_RATIO * file.stat().st_size)
        with opener(stream) as unpacked:
            bounded: Any = _Bounded(unpacked, limit)
            with tarfile.open(fileobj=bounded, mode="r|", **options) as shard:
                yield shard, True


def _read_contents(
    shard: tarfile.TarFile, is_packed: bool, keep_data: bool, left_out: Counter[str]
) -> _Contents:
    contents = _Contents()
    for member in shard:
        if member.isdir():
            continue
        name = posixpath.normpath(member.name)
        reason = reason_to_leave_out(name)
        if name.endswith(LABEL_SUFFIX) and member.isreg():
            contents.labels[name] = _read_label(shard, member)
            continue
        if name.endswith(JSON_SUFFIX) and member.isreg():
            try:
                label = _read_json_label(shard, member)
            except _DamagedJsonError:
                label, reason = None, NO_JSON
            if label is not None:
                contents.labels[name] = label
                continue
        if member.isreg() and not member.issparse() and (reason is None or not is_packed):
            data = _read_member(shard, member) if is_packed and keep_data else None
            contents.places[name] = (member.offset_data, member.size, data)
        elif member.islnk():
            contents.links[name] = posixpath.normpath(member.linkname)
        elif member.issym():
            folder = posixpath.dirname(name)
            contents.links[name] = posixpath.normpath(posixpath.join(folder, member.linkname))
            if reason == NOT_AN_IMAGE and "." not in posixpath.basename(name):
                reason = FOLDER_LINK
        elif reason is None:
            reason = SPARSE if member.isreg() else NOT_A_FILE
        if reason is None and name in contents.names:
            reason = REPLACED
        if reason is None or reason == REPLACED:
            contents.names[name] = member.name
        if reason is not None:
            left_out[reason] += 1
    return contents


def _images(contents: _Contents, left_out: Counter[str]) -> list[str]:
    """Names of the images, without those that accompany another one of the same sample."""
    plain = {_sample_name(name) for name in contents.names if _is_plain(name)}
    images = [name for name in contents.names if _is_plain(name) or _sample_name(name) not in plain]
    if len(images) < len(contents.names):
        left_out[COMPANION] += len(contents.names) - len(images)
    return images


def _is_plain(name: str) -> bool:
    return posixpath.basename(name).count(".") == 1


def _sample_name(name: str) -> str:
    folder, base = posixpath.split(name)
    return posixpath.join(folder, base.partition(".")[0])


def _labels_of_samples(contents: _Contents) -> dict[str, int]:
    """Classes by sample; equal files of them may have become links to one."""
    suffixes = (LABEL_SUFFIX, JSON_SUFFIX)
    files = [*contents.labels, *(name for name in contents.links if name.endswith(suffixes))]
    files.sort(key=lambda name: name.endswith(LABEL_SUFFIX))  # a .cls goes over a .json
    targets = {_sample_name(name): _target(contents, name) for name in files}
    return {
        sample: contents.labels[target] for sample, target in targets.items() if target in contents.labels
    }


def _target(contents: _Contents, name: str) -> str:
    """The file that a name leads to, through its links; of a link that leads to none some name."""
    for _ in range(_MAX_LINKS):
        if name in contents.places or name in contents.labels:
            break
        name = contents.links.get(name, name)
    return name


class _DamagedJsonError(Exception):
    pass


def _read_json_label(shard: tarfile.TarFile, member: tarfile.TarInfo) -> int | None:
    """The class that a sample's ``.json`` states as ``label`` or ``cls``; None where it states none.

    Raises:
        DataError: it states something else than a class.
        _DamagedJsonError: it cannot be read.
    """
    if member.size > _MAX_JSON_BYTES:
        return None
    try:
        fields = json.loads(_read_member(shard, member))
    except (ValueError, RecursionError) as exc:
        raise _DamagedJsonError from exc
    stated = [fields.get(name) for name in _JSON_LABELS] if isinstance(fields, dict) else []
    label = next((value for value in stated if value is not None), None)
    if label is not None and (type(label) is not int or not 0 <= label < _MAX_LABEL):
        shown = printable(json.dumps(label)[:20])
        raise DataError(f"{printable(member.name)} holds the label {shown}, and not the number of a class")
    return label


def _read_label(shard: tarfile.TarFile, member: tarfile.TarInfo) -> int:
    text = _read_member(shard, member, _MAX_LABEL_BYTES)
    if not _LABEL.fullmatch(text):
        shown = printable(text[:20].decode("latin-1"))
        raise DataError(f"{printable(member.name)} holds {shown!r}, and not the number of a class")
    return int(text)


def _read_member(shard: tarfile.TarFile, member: tarfile.TarInfo, limit: int = -1) -> bytes:
    stream = shard.extractfile(member)
    assert stream is not None, "regular files have contents"
    return stream.read(limit)
