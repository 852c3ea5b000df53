"""Object storage in the memory of this process, by fsspec's own file system, beside a folder."""

from collections.abc import Iterator
from pathlib import Path

import fsspec
import pytest

from training.errors import DataError
from training.latents.storage.objects import ObjectStore
from training.latents.store import FolderStore, Store


@pytest.fixture(params=["folder", "objects"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "folder":
        yield FolderStore(tmp_path / "latents")
        return
    yield ObjectStore("memory://bucket/latents/")
    fsspec.filesystem("memory").store.clear()


def test_files_are_read_as_they_were_written(store):
    assert store.names() == set()
    store.write("a.bin", b"0123456789")
    store.write(".a.bin.receipt", b"{}")
    assert store.names() == {"a.bin", ".a.bin.receipt"}
    assert store.size("a.bin") == 10
    assert store.read("a.bin") == b"0123456789"
    assert store.read("a.bin", 2, 5) == b"234"
    assert store.read("a.bin", 8) == b"89"
    store.write("a.bin", b"new")
    assert store.read("a.bin") == b"new"


def test_what_is_not_there_is_none_and_can_be_removed(store):
    assert (store.size("a.bin"), store.read("a.bin"), store.read("a.bin", 1, 2)) == (None, None, None)
    store.remove("a.bin")
    store.write("a.bin", b"x")
    store.remove("a.bin")
    assert store.names() == set()
    store.remove_remains()


def test_a_place_that_cannot_be_reached_is_told_by_its_url():
    with pytest.raises(DataError, match=r"nosuch://bucket/latents"):
        ObjectStore("nosuch://bucket/latents")


def test_an_error_of_the_storage_names_the_object(monkeypatch):
    def refuse(*_):
        raise PermissionError("no access key")  # as s3fs has it: neither number nor file

    store = ObjectStore("memory://bucket/latents")
    monkeypatch.setattr(store.fs, "pipe_file", refuse)
    with pytest.raises(PermissionError) as caught:
        store.write("a.bin", b"x")
    assert caught.value.filename == "memory://bucket/latents/a.bin"
    assert caught.value.strerror == "no access key"
