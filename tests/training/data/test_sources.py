import gzip
import io
import os
import tarfile
from pathlib import Path

import pytest

from tests.training.conftest import encode_png, make_image, write_shard
from training.data.index import index_file
from training.data.sources import Listing, list_images, list_samples
from training.errors import DataError


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


def keys(listing: Listing) -> list[str]:
    return [sample.key for sample in listing]


def write_tar(file: Path, *members: tuple[str, bytes | str, dict[str, object]]) -> Path:
    """A tar of files (bytes) and of links (the target's name)."""
    with tarfile.open(file, "w") as shard:
        for name, contents, fields in members:
            info = tarfile.TarInfo(name)
            if isinstance(contents, str):
                info.linkname = contents
            else:
                info.size = len(contents)
            for field, value in fields.items():
                setattr(info, field, value)
            shard.addfile(info, io.BytesIO(contents) if isinstance(contents, bytes) else None)
    return file


HARD, SYMBOLIC = {"type": tarfile.LNKTYPE}, {"type": tarfile.SYMTYPE}
PHOTO = encode_png(make_image(0))


@pytest.mark.parametrize("name", ["a.tar", "a.tar.gz", "a.tgz", "A.TAR"])
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_compression_is_told_by_the_first_bytes(tmp_path: Path, name: str, mode: str) -> None:
    images = members(3)
    listing = list_samples([write_shard(tmp_path / name, images, mode)])
    assert [sample.read() for sample in listing] == list(images.values())
    assert keys(list_samples([tmp_path])) == keys(listing)


@pytest.mark.parametrize("is_compressed", [False, True])
def test_links_are_the_members_that_they_lead_to(tmp_path: Path, is_compressed: bool) -> None:
    shard = write_tar(
        tmp_path / "a.tar",
        ("./class/b.png", PHOTO, {}),
        ("./class/a.png", "./class/b.png", HARD),
        ("./other/c.png", "../class/a.png", SYMBOLIC),
        ("early.png", "late.png", SYMBOLIC),
        ("late.png", PHOTO, {}),
        ("loop.png", "loop.png", SYMBOLIC),
        ("out.png", "/etc/passwd", SYMBOLIC),
        ("gone.png", "nowhere.png", HARD),
        ("c.cls", b"3", {}),
    )
    if is_compressed:
        shard.write_bytes(gzip.compress(shard.read_bytes()))
    listing = list_samples([shard])
    assert keys(listing) == ["./class/b", "./class/a", "./other/c", "early", "late"]
    assert all(sample.read() == PHOTO for sample in listing)
    assert listing.left_out == {"link without a target": 3}


@pytest.mark.parametrize("is_compressed", [False, True])
def test_equal_labels_may_have_become_links(tmp_path: Path, is_compressed: bool) -> None:
    shard = write_tar(
        tmp_path / "a.tar",
        ("a.cls", b"4", {}),
        ("a.png", PHOTO, {}),
        ("b.cls", "a.cls", HARD),
        ("b.png", PHOTO, {}),
        ("c.cls", "b.cls", SYMBOLIC),
        ("c.png", PHOTO, {}),
        ("d.cls", "nowhere.cls", SYMBOLIC),
        ("d.png", PHOTO, {}),
    )
    if is_compressed:
        shard.write_bytes(gzip.compress(shard.read_bytes()))
    assert [sample.label for sample in list_samples([shard])] == [4, 4, 4, None]


def test_a_linked_folder_in_a_shard_is_no_small_matter(tmp_path: Path) -> None:
    shard = write_tar(tmp_path / "a.tar", ("a.png", PHOTO, {}), ("class", "../other/class", SYMBOLIC))
    assert list_samples([shard]).lacks_photos


@pytest.mark.parametrize("mode", ["w", "w:gz"])
def test_joined_shards_are_listed_whole(tmp_path: Path, mode: str) -> None:
    images = members(3)
    parts = [
        write_shard(tmp_path / "part.tar", {image: images[image]}, mode).read_bytes() for image in images
    ]
    joined = tmp_path / "joined.tar"
    joined.write_bytes(b"".join(parts))
    assert [sample.read() for sample in list_samples([joined])] == list(images.values())
    joined.write_bytes(joined.read_bytes() + b"damaged " * 64)
    with pytest.raises(DataError, match=r"joined\.tar"):
        list_samples([joined])


def test_what_is_no_file_in_a_shard_is_counted(tmp_path: Path) -> None:
    shard = write_tar(
        tmp_path / "a.tar",
        ("a.png", PHOTO, {}),
        ("fifo.png", "", {"type": tarfile.FIFOTYPE}),
        ("device.png", "", {"type": tarfile.CHRTYPE}),
        ("b.heic", b"x", {}),
        ("notes.txt", b"x", {}),
        ("._a.png", b"x", {}),
        ("a.png", PHOTO, {}),
    )
    listing = list_samples([shard])
    assert keys(listing) == ["a"]
    assert sorted(listing.left_out.values()) == [1, 1, 1, 1, 2]


def test_dots_in_names_and_several_images_of_a_sample(tmp_path: Path) -> None:
    """The image is the one without further dots; where there is none, all are images."""
    names = ["ok.png", "photo.v2.png", "2024.01.05.jpg", "0001.png", "0001.jpg", "0001.mask.png"]
    contents = {name: PHOTO for name in names} | {"photo.cls": b" 7\n", "0001.cls": b"8"}
    listing = list_samples([write_shard(tmp_path / "a.tar", contents)])
    found = {sample.key: sample.label for sample in listing}
    assert found == {"ok": None, "photo.v2": 7, "2024.01.05": None, "0001.png": 8, "0001.jpg": 8}
    assert list(listing.left_out.values()) == [1]


@pytest.mark.parametrize("text", [b"9" * 30, b"9" * 100_000, b"cat", b"", b"-1", b"1.5", b"\xff\xfe"])
def test_classes_that_are_no_numbers_are_named(tmp_path: Path, text: bytes) -> None:
    shard = write_shard(tmp_path / "a.tar", {"a.cls": text, "a.png": PHOTO})
    with pytest.raises(DataError, match=r"a\.tar: a\.cls holds .* not the number of a class"):
        list_samples([shard])


@pytest.mark.parametrize("name", ["caf\udce9.png", "a\nb.png", "\x1b[31m.png"])
def test_names_are_printable(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_bytes(PHOTO)
    write_shard(tmp_path / "folder" / "z.tar", {name: PHOTO})
    for sample in list_samples([tmp_path / "folder"]):
        assert sample.key.isprintable()
        assert (sample.key + sample.file_name).encode()
        assert sample.read() == PHOTO


def test_a_gzip_bomb_is_refused_before_it_fills_the_memory(tmp_path: Path) -> None:
    header = tarfile.TarInfo("a.png")
    header.size = 2**33
    with gzip.open(tmp_path / "a.tar.gz", "wb", 1) as stream:
        stream.write(header.tobuf())
        for _ in range(9):
            stream.write(bytes(2**23))
    with pytest.raises(DataError, match=r"a\.tar\.gz: it unpacks to more than"):
        list_samples([tmp_path / "a.tar.gz"])


@pytest.mark.parametrize("place", [0, 1, 2])
@pytest.mark.parametrize("is_compressed", [False, True])
def test_a_damaged_header_anywhere_is_an_error(tmp_path: Path, place: int, is_compressed: bool) -> None:
    """And not the end, behind which photos are missed."""
    shard = write_shard(tmp_path / "a.tar", {f"{index}.png": bytes(512) for index in range(3)})
    data = bytearray(shard.read_bytes())
    data[place * 1024 + 150] ^= 1
    shard.write_bytes(gzip.compress(data) if is_compressed else data)
    with pytest.raises(DataError, match=r"a\.tar: not a readable tar shard"):
        list_samples([shard])


def test_a_member_that_is_longer_than_its_shard_is_an_error(tmp_path: Path) -> None:
    header = tarfile.TarInfo("a.png")
    header.size = 2**42
    (tmp_path / "a.tar").write_bytes(header.tobuf() + PHOTO)
    with pytest.raises(DataError, match="not a readable tar shard"):
        list_samples([tmp_path / "a.tar"])


def test_every_suffix_in_any_case(tmp_path: Path) -> None:
    names = ["a.tif", "b.TIFF", "c.JPG", "d.webp", "e.gif", "f.bmp"]
    for name in names:
        (tmp_path / name).write_bytes(b"x")
    write_shard(tmp_path / "z.tar", {name: b"x" for name in names})
    assert keys(list_samples([tmp_path])) == list("abcdef") * 2


def test_linked_folders_are_listed_once(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for folder in (data / "real", tmp_path / "plain"):
        folder.mkdir(parents=True)
        (folder / "a.png").write_bytes(PHOTO)
    (data / "again").symlink_to("real")
    (data / "linked").symlink_to("../plain")
    (data / "real" / "loop").symlink_to("..")
    (data / "self").symlink_to("self")
    (data / "photo.png").symlink_to("real/a.png")
    (data / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(data / "pipe.png")
    listing = list_samples([data])
    assert keys(listing) == ["linked/a", "photo", "real/a"]
    assert listing.left_out == {
        "link to a folder that is listed already": 2,
        "link without a target": 2,
        "neither a file nor a folder": 1,
    }
    assert listing.lacks_photos


def test_the_log_says_what_was_left_out(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "a.png").write_bytes(PHOTO)
    (tmp_path / "b.heic").write_bytes(b"x")
    list_samples([tmp_path])
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "listed 1 images; left out 1: 1 x picture in a format that is not read" in record.getMessage()


def test_a_name_with_a_dollar_sign_is_no_variable_where_it_exists(tmp_path: Path) -> None:
    (tmp_path / "a$b").mkdir()
    (tmp_path / "a$b" / "a.png").write_bytes(PHOTO)
    assert keys(list_samples([tmp_path / "a$b"])) == ["a"]


def test_an_index_is_used_while_its_folder_stays_as_it_was(
    photos: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_shard(photos / "more.tar", {"a.png": encode_png(make_image(50)), "a.cls": b"3"})
    plain = list_images([photos])
    assert not index_file(photos).exists()  # none is kept that nobody asked for
    index_file(photos).touch()
    assert list_images([photos]) == plain
    with monkeypatch.context() as patch:
        patch.setattr("training.data.sources._walk", lambda *_: pytest.fail("the folder was listed"))
        assert list_images([photos]) == plain
    make_image(60).save(photos / "60.png")
    assert len(list_images([photos])) == len(plain) + 1
    write_shard(
        photos / "more.tar", {"a.png": encode_png(make_image(51)), "b.png": encode_png(make_image(52))}
    )
    assert len(list_images([photos])) == len(plain) + 2
    index_file(photos).write_text("no json")
    assert len(list_images([photos])) == len(plain) + 2


def test_an_index_of_a_tar_lies_beside_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shard = write_shard(tmp_path / "a.tar", {"a.png": encode_png(make_image(1)), "a.cls": b"3"})
    index_file(shard).touch()
    (plain,) = list_images([shard])
    monkeypatch.setattr("training.data.sources.list_members", lambda *_: pytest.fail("the tar was read"))
    (sample,) = list_images([shard])
    assert sample == plain
    assert (sample.label, sample.read()) == (3, encode_png(make_image(1)))
