"""Places: paths of this machine, and URLs such as ``s3://bucket/folder``, which fsspec reaches."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from training.errors import DataError

_NUMBERS = {FileNotFoundError: errno.ENOENT, PermissionError: errno.EACCES}
"""Of errors that file systems raise with a sentence alone; by its number an `OSError` has its class again."""


def as_place(text: str) -> Path:
    """A path, or for a URL an object with the methods of one (`upath.UPath`), which is no `Path`.

    Raises:
        DataError: a URL's protocol is unknown, or a package that it needs is not installed.
    """
    if "://" not in text:
        return Path(text)
    with explained(text):
        try:
            from upath import UPath
        except ImportError as exc:
            raise DataError(f"{text}: URLs need the package 'upath': pip install 'drorae[storage]'") from exc
        place = UPath(text)
        place.fs  # noqa: B018 - imports the protocol's package
        return cast(Path, place)


def is_remote(place: Path) -> bool:
    """Whether a place is a URL."""
    return not isinstance(place, Path)


def file_system(place: Path) -> tuple[Any, str]:
    """Of a URL: fsspec's file system, and the path in it."""
    remote: Any = place
    return remote.fs, str(remote.path).rstrip("/")


@contextmanager
def explained(url: str) -> Iterator[None]:
    """Errors of a file system with the URL; those that are no `OSError` become a `DataError`."""
    try:
        yield
    except OSError as exc:
        if exc.strerror is not None and exc.filename is not None:
            raise
        number = next((number for kind, number in _NUMBERS.items() if isinstance(exc, kind)), errno.EIO)
        raise OSError(exc.errno or number, exc.strerror or str(exc), url) from exc
    except DataError:
        raise
    except Exception as exc:  # of the storage's own library, which may be any
        raise DataError(f"{url}: {type(exc).__name__}: {exc}") from exc
