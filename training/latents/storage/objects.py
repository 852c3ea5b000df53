"""Latents in object storage, or in any other place that fsspec reaches: ``s3://bucket/folder``."""

from typing import Any

from fsspec.core import url_to_fs

from training.latents.storage.places import explained


class ObjectStore:
    """A folder at a URL, with the methods of `training.latents.store.Store`.

    An object is put whole or not at all, so a file needs no temporary name.

    Args:
        url: of the folder, such as ``s3://bucket/latents``.

    Raises:
        DataError: the URL's protocol is unknown, or its package is not installed.
    """

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/")
        with explained(self.url):
            # Others write to the folder too, so nothing of it is remembered.
            self.fs, self.root = url_to_fs(self.url, use_listings_cache=False)

    def path(self, name: str) -> str:
        return f"{self.url}/{name}"

    def names(self) -> set[str]:
        with explained(self.url):
            try:
                entries: list[dict[str, Any]] = self.fs.ls(self.root, detail=True)
            except FileNotFoundError:
                return set()
        return {entry["name"].rstrip("/").rpartition("/")[2] for entry in entries if entry["type"] == "file"}

    def size(self, name: str) -> int | None:
        with explained(self.path(name)):
            try:
                return int(self.fs.size(f"{self.root}/{name}"))
            except FileNotFoundError:
                return None

    def read(self, name: str, start: int = 0, stop: int | None = None) -> bytes | None:
        with explained(self.path(name)):
            try:
                return bytes(self.fs.cat_file(f"{self.root}/{name}", start=start, end=stop))
            except FileNotFoundError:
                return None

    def write(self, name: str, data: bytes) -> None:
        with explained(self.path(name)):
            try:
                self.fs.pipe_file(f"{self.root}/{name}", data)
            except FileNotFoundError:
                # A file system has folders, which are made. A bucket that is missing is an error.
                if not self.fs.exists(self.root.partition("/")[0] or "/"):
                    raise
                self.fs.makedirs(self.root, exist_ok=True)
                self.fs.pipe_file(f"{self.root}/{name}", data)

    def remove(self, name: str) -> None:
        with explained(self.path(name)):
            try:
                self.fs.rm_file(f"{self.root}/{name}")
            except FileNotFoundError:
                return

    def free_bytes(self) -> int | None:
        """None: nothing tells how much room there is."""

    def remove_remains(self) -> None:
        """Nothing: a killed process leaves no part of an object."""
