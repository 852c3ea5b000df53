"""What there is to do: the images of folders, tars and lists, cut into units."""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path

from training.data.classes import read_class_names
from training.data.names import is_tar, printable
from training.data.sources import Sample, expand_path, list_images
from training.errors import DataError
from training.latents.manifest import InputRecord
from training.latents.storage.inputs import list_remote
from training.latents.storage.places import as_place, is_remote
from training.latents.units import NO_LABEL, Unit, UnitImage

MAX_UNIT_IMAGES = 1000
MAX_UNIT_BYTES = 256 * 2**20
MIN_UNITS = 16
"""Of a job as small as that: else some of a machine's cores would have nothing to do."""
LIST_SUFFIXES = (".txt", ".tsv", ".lst", ".list")


@dataclass(frozen=True)
class Plan:
    """All units of a job.

    Attributes:
        units: in the order of the data.
        images_per_unit: at most.
        inputs: the folders, tars and lists that they come from.
        classes: names by label, where something names them.
        left_out: numbers of files and members that are no images, by the reason.
    """

    units: list[Unit]
    images_per_unit: int
    inputs: tuple[InputRecord, ...]
    classes: tuple[str, ...]
    left_out: Counter[str]

    @property
    def num_images(self) -> int:
        return sum(len(unit) for unit in self.units)


@dataclass
class _Input:
    """A folder, tar or list, with its images."""

    name: str
    samples: list[Sample] = field(default_factory=list)


def images_per_unit(num_images: int, image_bytes: int, batch_size: int) -> int:
    """Most images of a unit: whole batches, about 1,000 images or 256 MiB, fewer where there are few.

    Args:
        num_images: of the whole job.
        image_bytes: of one image's latents.
        batch_size: of the unit's batches.
    """
    most = min(MAX_UNIT_IMAGES, MAX_UNIT_BYTES // image_bytes, -(-num_images // MIN_UNITS) + batch_size - 1)
    return max(1, most // batch_size) * batch_size


def plan_units(paths: Sequence[Path], image_bytes: int, batch_size: int) -> Plan:
    """List the images and cut them into units.

    Args:
        paths: folders, ``.tar``, ``.tar.gz`` and ``.tgz`` files, and lists (``.txt``, ``.tsv``), or their
            URLs, of `as_place`.
        image_bytes: of one image's latents.
        batch_size: images that are encoded at once.

    Raises:
        DataError: a path is missing, damaged or given twice, a label is no number, or there is no image.
        OSError: a list cannot be read.
    """
    left_out: Counter[str] = Counter()
    inputs: list[_Input] = []
    folders: list[_Input] = []
    for path, name in zip(paths, _names(paths), strict=True):
        found = _list_input(_expanded(path), name, left_out)
        inputs += found
        folders += [one for one in found if path.is_dir() and one.name == name]
    if not any(one.samples for one in inputs):
        shown = ", ".join(printable(str(path)) for path in paths)
        raise DataError(f"no images in {shown}{describe_left_out(left_out)}")
    classes = _label_by_folder(folders, inputs, [_expanded(path) for path in paths])
    total = sum(len(one.samples) for one in inputs)
    num_images = images_per_unit(total, image_bytes, batch_size)
    units: list[Unit] = []
    records = []
    for one in inputs:
        images = [unit_image(sample) for sample in one.samples]
        is_packed = any(sample.is_packed for sample in one.samples)
        records.append(input_record(one.name, images))
        units += cut_units(one.name, images, num_images, len(units), is_packed)
    return Plan(units, num_images, tuple(records), classes, left_out)


def _expanded(path: Path) -> Path:
    return path if is_remote(path) else expand_path(path)


def cut_units(
    name: str, images: Sequence[UnitImage], num_images: int, first: int = 0, is_compressed: bool = False
) -> list[Unit]:
    """Cut an input into units.

    Args:
        name: of the input.
        images: all of it.
        num_images: of a unit at most.
        first: number of the first unit.
        is_compressed: whether the images' tar must be unpacked from its beginning.
    """
    return [
        Unit(first + number, name, start, tuple(images[start : start + num_images]), is_compressed)
        for number, start in enumerate(range(0, len(images), num_images))
    ]


def _names(paths: Sequence[Path]) -> list[str]:
    """What the inputs are called: their last part, where that tells them apart."""
    for first, second in groupby(sorted(str(path.absolute()) for path in paths)):
        if len(list(second)) > 1:
            raise DataError(f"{first} is given twice")
    last = [path.absolute().name for path in paths]
    uses = Counter(last)
    return [printable(name if uses[name] == 1 else str(path)) for path, name in zip(paths, last, strict=True)]


def _list_input(path: Path, name: str, left_out: Counter[str]) -> list[_Input]:
    """A folder's loose images as one input, and each tar as one of its own."""
    if path.is_file() and path.suffix.lower() in LIST_SUFFIXES:
        return _list_file(path, name, left_out)
    if path.is_file() and not is_tar(path):
        raise DataError(f"{path} is neither a folder, a tar, nor a list ({', '.join(LIST_SUFFIXES)})")
    if is_remote(path):
        samples = list_remote(path, left_out)
    else:
        listing = list_images([path], keep_data=False)
        samples = listing.samples
        left_out += listing.left_out
    loose = _Input(name)
    tars: dict[Path, _Input] = {}
    for sample in samples:
        if not sample.is_member:
            loose.samples.append(sample)
            continue
        if sample.file not in tars:
            below = printable(str(sample.file.relative_to(path)))
            tars[sample.file] = _Input(name if below == "." else f"{name}/{below}")
        tars[sample.file].samples.append(sample)
    return [loose, *tars.values()] if loose.samples else list(tars.values())


def _list_file(file: Path, name: str, left_out: Counter[str]) -> list[_Input]:
    """The images and tars that a list names: a path a line, then a tab and a label if it has one.

    Raises:
        DataError: a label is no number, a path is there twice, or a tar is damaged; names the line.
    """
    loose, tars = _Input(name), list[_Input]()
    first_lines: dict[str, int] = {}
    for number, text in enumerate(_lines(file), start=1):
        place = f"{printable(str(file))}: line {number}"
        entry, _, label = text.partition("\t")
        if entry in first_lines:
            raise DataError(f"{place}: {printable(entry)} is there twice, first in line {first_lines[entry]}")
        first_lines[entry] = number
        path = as_place(entry) if "://" in entry else file.parent / entry
        if is_tar(path):
            tars += _list_input(path, printable(entry), left_out)
        else:
            loose.samples.append(Sample(printable(entry), path, label=_label(label.strip(), place)))
    return [loose, *tars] if loose.samples else tars


def _lines(file: Path) -> Iterator[str]:
    """Lines that are not empty; names need not be UTF-8."""
    with file.open(encoding="utf-8", errors="surrogateescape") as stream:
        for line in stream:
            if text := line.rstrip("\r\n"):
                yield text


def _label(text: str, place: str) -> int | None:
    if not text:
        return None
    if not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise DataError(f"{place}: the label {printable(text[:20])!r} is not the number of a class")
    return int(text)


def _label_by_folder(
    folders: Sequence[_Input], inputs: Sequence[_Input], paths: Sequence[Path]
) -> tuple[str, ...]:
    """Label images in class folders, and give the names of all classes.

    An image that lies directly in the folder that was named has no class.
    """
    roots = {path for path in paths if path.is_dir()}
    in_classes = [
        (one, index)
        for one in folders
        for index, sample in enumerate(one.samples)
        if sample.file.parent not in roots
    ]
    stated = next((s for one in inputs for s in one.samples if s.label is not None), None)
    if stated is None:
        names = sorted({one.samples[index].file.parent.name for one, index in in_classes})
        numbers = {name: number for number, name in enumerate(names)}
        for one, index in in_classes:
            sample = one.samples[index]
            one.samples[index] = replace(sample, label=numbers[sample.file.parent.name])
        return tuple(map(printable, names))
    if in_classes:
        one, index = in_classes[0]
        raise DataError(
            f"{stated.key} in {stated.file} has a number as its label, and {one.samples[index].file} a class "
            "folder: their numbers may differ, so tokenize them apart or give a list with labels"
        )
    return read_class_names(paths)


def unit_image(sample: Sample) -> UnitImage:
    """A listed image as a unit has it."""
    label = NO_LABEL if sample.label is None else sample.label
    path = str(sample.file) if is_remote(sample.file) else os.path.abspath(sample.file)
    return UnitImage(sample.key, path, sample.offset, sample.num_bytes, label)


def input_record(name: str, images: Sequence[UnitImage]) -> InputRecord:
    """What the manifest says of an input."""
    digest = hashlib.sha256()
    num_bytes = 0
    for image in images:
        digest.update(json.dumps([image.key, image.label]).encode())
        num_bytes += _file_bytes(image.path) if image.num_bytes is None else image.num_bytes
    return InputRecord(name=name, images=len(images), num_bytes=num_bytes, sha256=digest.hexdigest())


def _file_bytes(path: str) -> int:
    """Size of a file; one that is missing counts as empty, and will be recorded as broken."""
    try:
        return as_place(path).stat().st_size
    except OSError:
        return 0


def describe_left_out(left_out: Counter[str]) -> str:
    """What is no image, and why, as the end of a sentence; empty if there is none."""
    reasons = [f"{count:,} x {reason}" for reason, count in sorted(left_out.items())]
    return f"; left out {left_out.total():,}: {', '.join(reasons)}" if reasons else ""
