from pathlib import Path

import pytest

from tests.training.conftest import encode_png, make_image, write_shard
from training.errors import DataError
from training.sources import list_samples


def members(count: int) -> dict[str, bytes]:
    return {f"class/{index}.png": encode_png(make_image(index)) for index in range(count)}


@pytest.mark.parametrize(("name", "mode"), [("a.tar", "w"), ("a.tar.gz", "w:gz")])
def test_shard_members_read_back(tmp_path: Path, name: str, mode: str) -> None:
    images = members(3)
    shard = write_shard(tmp_path / name, {**images, "class/1.cls": b"42", "readme.txt": b"no image"}, mode)
    samples = list_samples([shard])
    assert [sample.read() for sample in samples] == list(images.values())
    assert [sample.label for sample in samples] == [None, 42, None]


def test_folder_is_recursive_sorted_and_may_hold_shards(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    make_image(0).save(tmp_path / "b" / "2.jpg")
    make_image(1).save(tmp_path / "1.png")
    (tmp_path / "notes.txt").write_text("not an image")
    write_shard(tmp_path / "z.tar", members(2))
    assert [sample.key for sample in list_samples([tmp_path])] == ["1", "b/2", "class/0", "class/1"]


def test_missing_path_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere does not exist"):
        list_samples([tmp_path / "nowhere"])


def test_no_images_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images in"):
        list_samples([tmp_path])


def test_corrupt_shard_is_named(tmp_path: Path) -> None:
    shard = write_shard(tmp_path / "a.tar.gz", members(3), "w:gz")
    shard.write_bytes(shard.read_bytes()[:200])
    with pytest.raises(DataError, match=r"a\.tar\.gz: not a readable tar shard"):
        list_samples([shard])


def test_other_files_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "list.txt"
    file.write_text("x")
    with pytest.raises(DataError, match="neither a folder nor a tar shard"):
        list_samples([file])
