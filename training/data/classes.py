"""Classes of a listing: labels from the source, or from the folders that images lie in; and their names."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from training.data.sources import Sample, expand_path
from training.errors import DataError

NAMES_FILE = "classes.txt"
_NUMBER = re.compile(r"^\d+\s+")  # of the class, before its name


@dataclass(frozen=True)
class Classes:
    """The classes of a data set.

    Attributes:
        names: in the order of the labels; empty where nothing names them.
        count: how many there are.
        by_folder: whether the folder of an image is its class; None: where the image has no label.
    """

    names: tuple[str, ...]
    count: int
    by_folder: bool | None

    def label(self, samples: Sequence[Sample]) -> list[Sample]:
        """The samples, each with its label.

        Raises:
            DataError: a sample has no class, or one that is not among these; names it.
        """
        return [replace(sample, label=self._label(sample)) for sample in samples]

    def _label(self, sample: Sample) -> int:
        label = sample.label
        if self.by_folder or (self.by_folder is None and label is None):
            folder = sample.file.parent.name
            if folder not in self.names:
                raise DataError(f"{sample.file}: its folder {folder!r} is none of the {self.count} classes")
            label = self.names.index(folder)
        if label is None:
            raise DataError(f"{sample.key} in {sample.file}: has no class (a .cls member or a class folder)")
        if not 0 <= label < self.count:
            raise DataError(f"{sample.key} in {sample.file}: label {label}, of {self.count} classes")
        return label


def find_classes(
    samples: Sequence[Sample], paths: Sequence[Path], names: tuple[str, ...] | None = None
) -> Classes:
    """The classes of training images.

    Args:
        samples: the listing.
        paths: what was listed; ``classes.txt`` in or beside one of them names the classes.
        names: names that are given instead.

    Raises:
        DataError: there are no labels, or not as many names as classes.
    """
    labelled = [sample.label for sample in samples if sample.label is not None]
    if not labelled and all(not sample.is_member for sample in samples):
        found = tuple(sorted({sample.file.parent.name for sample in samples}))
        return Classes(names or found, len(names or found), by_folder=True)
    if len(labelled) != len(samples):
        raise DataError(
            f"{len(samples) - len(labelled)} of {len(samples)} images have no class (a .cls member each)"
        )
    names = names or read_class_names(paths)
    count = max(labelled) + 1
    if names and len(names) < count:
        raise DataError(f"labels go up to {count - 1}, and {len(names)} classes have names")
    return Classes(names, len(names) or count, by_folder=False)


def read_class_names(paths: Sequence[Path]) -> tuple[str, ...]:
    """Names by label, from the first ``classes.txt`` in or beside a path; empty where there is none."""
    for path in map(expand_path, paths):
        file = (path if path.is_dir() else path.parent) / NAMES_FILE
        if file.is_file():
            lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
            return tuple(_NUMBER.sub("", line) for line in lines)
    return ()
