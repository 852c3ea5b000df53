"""Latents in object storage, or in any other place that fsspec reaches: ``s3://bucket/folder``."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fsspec.core import url_to_fs

from training.errors import LatentsError


class ObjectStore:
    """A folder at a URL, with the methods of `training.latents.store.Store`.

    An object is put whole or not at all, so a file needs no temporary name.

    Args:
        url: of the folder, such as ``s3://bucket/latents``.

    Raises:
        LatentsError: the URL's protocol is unknown, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        with _told(self.url):
            # Others write to the folder too, so nothing of it is remembered.
            self.fs, self.root = url_to_fs(self.url, use_listings_cache=False)

    def path(self, name: str) -> str:
        return f"{self.url}/{name}"

    def names(self) -> set[str]:
        with _told(self.url):
            try:
                entries: list[dict[str, Any]] = self.fs.ls(self.root, detail=True)
            except FileNotFoundError:
                return set()
        return {entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "file"}

    def size(self, name: str) -> int | None:
        with _told(self.path(name)):
            try:
                return int(self.fs.size(f"{self.root}/{name}"))
            except FileNotFoundError:
                return None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes | None:
        with _told(self.path(name)):
            try:
                return bytes(self.fs.cat_file(f"{self.root}/{name}", start=start, end=stop))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        with _told(self.path(name)):
            self.fs.pipe_file(f"{self.root}/{name}", data)

    def remove(self, name: str) -> None:
        with _told(self.path(name)):
            try:
                self.fs.rm_file(f"{self.root}/{name}")
            except FileNotFoundError:
                return

    def remove_remains(self) -> None:
        """Nothing: a killed process leaves no part of an object."""


@contextmanager
def _told(url: str) -> Iterator[None]:
    """Errors of a file system as those of ours, with the URL."""
    try:
        yield
    except ImportError as exc:
        raise LatentsError(f"{url}: {exc}") from exc
    except OSError as exc:
        if exc.filename is None:
            exc.filename = url
        raise
    except Exception as exc:  # of the storage's own library, which may be any
        raise LatentsError(f"{url}: {type(exc).__name__}: {exc}") from exc
