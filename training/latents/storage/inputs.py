"""Images below a URL: listed once, and fetched by the batch."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from training.data.names import is_tar, reason_to_leave_out
from training.data.sources import Sample, list_shard, short_names
from training.errors import DataError
from training.latents.storage.places import as_place, explained, file_system


class Range(NamedTuple):
    """Bytes of an object: an image. None stands for the object's beginning and end."""

    url: str
    start: int | None
    stop: int | None


def list_remote(place: Path, left_out: Counter[str]) -> list[Sample]:
    """The images of a tar or of all objects below a URL, in the order of their names.

    Args:
        place: of `as_place`. Tars are read from beginning to end, as they have no table of their members.
        left_out: counts what is no image, by the reason.

    Raises:
        DataError: there is nothing, a tar is damaged, or the storage cannot be used.
        OSError: the storage cannot be read.
    """
    with explained(str(place)):
        if is_tar(place):
            return list_shard(place, left_out, keep_data=False)
        fs, root = file_system(place)
        found = {name[len(root) + 1 :]: entry["size"] for name, entry in fs.find(root, detail=True).items()}
    if not found:
        raise DataError(f"{place} does not exist, or has nothing below it")
    return list(_samples(place, found, left_out))


def _samples(place: Path, found: dict[str, int], left_out: Counter[str]) -> Iterator[Sample]:
    names = sorted(found)
    images = [name for name in names if reason_to_leave_out(name) is None]
    keys = dict(zip(images, short_names(images), strict=True))
    for name in names:
        if name in keys:
            yield Sample(keys[name], place / name, num_bytes=found[name])
        elif is_tar(Path(name)):
            yield from list_shard(place / name, left_out, keep_data=False)
        else:
            left_out[reason_to_leave_out(name) or ""] += 1


def fetch(ranges: Sequence[Range]) -> list[bytes | str]:
    """The images, side by side where the storage can, or why one of them is not there.

    Args:
        ranges: of one storage.

    Raises:
        DataError, OSError: the storage cannot be read; an image that is gone is no such error.
    """
    if not ranges:
        return []
    with explained(ranges[0].url):
        fs, _ = file_system(as_place(ranges[0].url))
        paths = [file_system(as_place(one.url))[1] for one in ranges]
        found = fs.cat_ranges(
            paths, [one.start or 0 for one in ranges], [one.stop for one in ranges], on_error="return"
        )
        return [_checked(one, data) for one, data in zip(ranges, found, strict=True)]


def _checked(one: Range, data: bytes | Exception) -> bytes | str:
    if isinstance(data, FileNotFoundError):
        return f"{one.url} does not exist"
    if isinstance(data, Exception):
        raise data
    if one.stop is not None and len(data) != one.stop - (one.start or 0):
        return f"{one.url} ends within it"
    return data
