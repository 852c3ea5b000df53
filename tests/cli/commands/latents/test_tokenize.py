"""``drorae tokenize``: exit statuses, and the sentence of each error."""

import io
import json
import os
import tarfile

import pytest

from tests.cli.conftest import save_photo


@pytest.fixture
def tokenize(run, checkpoint, tmp_path):
    """Runs the command on one worker; gives its outcome, the sentence of an error as ``err``'s last line."""

    def call(*argv):
        always = ("--checkpoint", checkpoint, "--output", tmp_path / "latents", "--workers", 1)
        return run("tokenize", *argv, *always)

    return call


def sentence(outcome, status: int) -> str:
    """What an error says, on one line after the progress bar."""
    assert outcome.status == status, outcome
    assert "Traceback" not in outcome.err
    last = outcome.err.strip().splitlines()[-1]
    assert last.startswith("drorae: ")
    return last


def manifest(tmp_path) -> dict:
    return json.loads((tmp_path / "latents" / "manifest.json").read_text())


def test_a_folder_is_done_and_says_what_was_left_out(tokenize, photos, tmp_path):
    outcome = tokenize(photos)
    assert outcome.status == 0
    assert "3 images in" in outcome.out
    assert "not listed 1: 1 x no image by its name" in outcome.out
    assert manifest(tmp_path)["totals"]["images"] == 3


def test_broken_images_are_named_and_the_status_is_3(tokenize, photos):
    (photos / "x.png").write_bytes(b"no image")
    outcome = tokenize(photos)
    assert outcome.status == 3
    assert "x in photos: not a readable image" in outcome.out


def test_ten_thousand_broken_images_in_a_row(tokenize, photo, tmp_path):
    """One sentence; the same command goes on where more are allowed."""
    lines = [photo.name, *(f"gone{index}.png" for index in range(10_001))]
    (tmp_path / "list.txt").write_text("\n".join(lines))
    assert "more than 10000 images" in sentence(tokenize(tmp_path / "list.txt"), 2)
    assert not manifest(tmp_path)["complete"]
    outcome = tokenize(tmp_path / "list.txt", "--max-broken", 20_000)
    assert outcome.status == 3
    assert "9,996 more" in outcome.out
    assert manifest(tmp_path)["totals"] | {"bytes": 0} == {"images": 1, "broken": 10_001, "bytes": 0}


def test_names_that_are_not_utf_8_and_names_that_are_there_twice(tokenize, tmp_path):
    photo = save_photo(tmp_path / "photo.png", 0).read_bytes()
    with tarfile.open(tmp_path / "shard.tar", "w", errors="surrogateescape") as shard:
        for name in ("a.png", b"\xff.png".decode(errors="surrogateescape"), "a.png"):
            info = tarfile.TarInfo(name)
            info.size = len(photo)
            shard.addfile(info, io.BytesIO(photo))
    outcome = tokenize(tmp_path / "shard.tar")
    assert outcome.status == 0
    assert "not listed 1: 1 x replaced by a later member of the same name" in outcome.out
    assert manifest(tmp_path)["totals"]["images"] == 2
    (tmp_path / "list.txt").write_text("photo.png\nphoto.png\n")
    assert "line 2: photo.png is there twice" in sentence(tokenize(tmp_path / "list.txt"), 2)


@pytest.mark.parametrize("label", ["cat", "-1", "1.5", "1e3"])
def test_a_label_that_is_no_number(tokenize, photo, tmp_path, label):
    (tmp_path / "list.txt").write_text(f"{photo.name}\t{label}\n")
    assert f"line 1: the label '{label}'" in sentence(tokenize(tmp_path / "list.txt"), 2)


def test_an_output_that_cannot_be_written(tokenize, run, checkpoint, photos, photo, tmp_path):
    arguments = ("tokenize", photos, "--checkpoint", checkpoint, "--workers", 1, "--output")
    assert "is a file" in sentence(run(*arguments, photo), 2)
    assert "Not a directory" in sentence(run(*arguments, photo / "below"), 1)
    (tmp_path / "latents").mkdir()
    (tmp_path / "latents").chmod(0o500)
    if os.geteuid():  # root may write anywhere
        assert "Permission denied" in sentence(tokenize(photos), 1)


def test_other_options_other_data_and_missing_data(tokenize, photos, tmp_path):
    assert tokenize(photos).status == 0
    assert "flip is False, not True" in sentence(tokenize(photos, "--flip"), 2)
    save_photo(photos / "new.png", 9)
    assert "photos had 3 images, and has 4" in sentence(tokenize(photos), 2)
    assert "does not exist" in sentence(tokenize(tmp_path / "gone"), 2)
    assert "neither a folder, a tar, nor a list" in sentence(tokenize(photos / "b.jpg"), 2)


@pytest.mark.parametrize("part", ["2/2", "-1/2", "1", "a/b", "1/0"])
def test_a_part_that_does_not_exist(tokenize, photos, part):
    outcome = tokenize(photos, f"--shard={part}")
    assert outcome.status == 2
    assert "expected i/n" in outcome.err


def test_normalising_needs_statistics(run, other_checkpoint, photos, tmp_path):
    arguments = ("tokenize", photos, "--checkpoint", other_checkpoint, "--output", tmp_path / "latents")
    assert "has no latent statistics" in sentence(run(*arguments, "--normalize"), 2)


def test_a_dry_run_writes_nothing(tokenize, photos, tmp_path):
    outcome = tokenize(photos, "--dry-run")
    assert outcome.status == 0
    assert "images/s" in outcome.out
    assert not (tmp_path / "latents").exists()
