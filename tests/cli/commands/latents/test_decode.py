"""``drorae decode`` by row or name, from a folder of latents, one of its files, or a file of ``encode``."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from cli.latents import open_named
from model.tokenizer import Tokenizer
from tests.training.latents.folders import make_latents


@pytest.fixture
def latents(checkpoint, tmp_path):
    """Five pictures in files of two."""
    return make_latents(Tokenizer.load(checkpoint), tmp_path / "latents", count=5, per_shard=2)


@pytest.fixture
def decode(run, checkpoint, tmp_path):
    """Decodes to ``out.png``; gives its bytes."""

    def call(source, *argv):
        outcome = run("decode", source, tmp_path / "out.png", "--checkpoint", checkpoint, *argv)
        assert outcome.status == 0, outcome
        return (tmp_path / "out.png").read_bytes()

    return call


@pytest.fixture
def decode_refused(refused, checkpoint, tmp_path):
    return lambda source, *argv: refused(
        "decode", source, tmp_path / "out.png", "--checkpoint", checkpoint, *argv
    )


def test_folder_and_file_give_the_picture_of_a_row_or_name(latents, decode, run, checkpoint, tmp_path):
    file = latents / "latents-000001.safetensors"
    picture = tmp_path / "latents-pictures" / "03.png"
    run("reconstruct", picture, tmp_path / "reconstructed.png", "--checkpoint", checkpoint)
    expected = (tmp_path / "reconstructed.png").read_bytes()
    for source, argv in (
        (latents, ("--row", 3)),
        (latents, ("--key", "more/03")),
        (file, ("--row", 1)),
        (file, ("--key", "more/03")),
    ):
        assert decode(source, *argv) == expected


def test_several_rows_become_numbered_pictures(latents, run, checkpoint, tmp_path):
    argv = (tmp_path / "out", "--checkpoint", checkpoint)
    assert run("decode", latents, *argv, "--key", "more/04", "more/00").status == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["0000.png", "0001.png"]
    run("decode", latents / "latents-000000.safetensors", tmp_path / "all", *argv[1:])
    assert (tmp_path / "all" / "0000.png").read_bytes() == (tmp_path / "out" / "0001.png").read_bytes()


def test_a_file_of_encode_knows_names_too(run, decode, checkpoint, photos, tmp_path):
    output = tmp_path / "encoded.safetensors"
    run("encode", photos, "-o", output, "--checkpoint", checkpoint)
    assert decode(output, "--key", "more/c") == decode(output, "--row", 2)


def test_a_file_of_many_names_is_decoded(run, decode, checkpoint, photo, tmp_path):
    output = tmp_path / "encoded.safetensors"
    run("encode", photo, "-o", output, "--checkpoint", checkpoint)
    with safe_open(output, "pt") as file:
        latents, metadata = file.get_tensor("latents"), file.metadata()
    names = [f"a-rather-long-name/{index:050d}" for index in range(3000)]
    save_file({"latents": latents.repeat(3000, 1, 1, 1)}, output, {**metadata, "keys": json.dumps(names)})
    assert decode(output, "--key", names[2999])


def test_the_latents_say_whether_they_are_normalised(run, decode, checkpoint, tmp_path):
    plain, normalized = (
        make_latents(Tokenizer.load(checkpoint), tmp_path / name, count=1, normalized=name == "normalized")
        for name in ("plain", "normalized")
    )
    assert not torch.equal(open_named(plain).read([0]), open_named(normalized).read([0]))
    one, other = (
        np.array(Image.open(io.BytesIO(decode(source, "--row", 0)))).astype(int)
        for source in (plain, normalized)
    )
    assert np.abs(one - other).max() <= 1


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        ((), "--row"),
        (("--row", "5"), "5 latents"),
        (("--key", "no-name"), "no-name"),
        (("--row", "0", "--key", "more/00"), ""),
        (("--row", "0", "1"), "folder"),
    ],
)
def test_what_is_not_there_or_unclear_is_told(latents, run, checkpoint, tmp_path, argv, words):
    outcome = run("decode", latents, tmp_path / "out.png", "--checkpoint", checkpoint, *argv)
    assert outcome.status == 2
    assert words in outcome.err
    assert not (tmp_path / "out.png").exists()


def test_names_need_a_file_that_has_them(decode_refused, run, photo, checkpoint, tmp_path):
    output = tmp_path / "one.npy"
    run("encode", photo, "-o", output, "--checkpoint", checkpoint)
    assert "--key" in decode_refused(output, "--key", "photo")
    assert "--row" in decode_refused(output, "--row", "0")


def test_foreign_and_damaged_folders_are_told(latents, decode_refused, other_checkpoint, tmp_path):
    other = make_latents(Tokenizer.load(other_checkpoint), tmp_path / "other", count=2)
    assert "other" in decode_refused(other, "--row", "0")
    assert "manifest.json" in decode_refused(tmp_path, "--row", "0")
    (latents / "latents-000002.safetensors").unlink()
    assert "latents-000002" in decode_refused(latents, "--row", "0")


def test_a_file_without_rows_or_with_damaged_names_is_told(decode_refused, checkpoint, run, photos, tmp_path):
    folder = make_latents(Tokenizer.load(checkpoint), tmp_path / "broken", count=3, per_shard=2, broken=2)
    assert "no latents" in decode_refused(folder / "latents-000001.safetensors")
    output = tmp_path / "encoded.safetensors"
    run("encode", photos, "-o", output, "--checkpoint", checkpoint)
    with safe_open(output, "pt") as file:
        latents, metadata = file.get_tensor("latents"), file.metadata()
    for entry in ("keys", "drorae"):
        save_file({"latents": latents}, output, {**metadata, "keys": "{", entry: "{"})
        assert "--key" in decode_refused(output, "--key", "a")


def test_a_name_that_two_photos_have_is_unclear(run, decode_refused, checkpoint, photos, tmp_path):
    output = tmp_path / "twice.safetensors"
    run("encode", photos, photos, "-o", output, "--checkpoint", checkpoint)
    assert "2 latents" in decode_refused(output, "--key", "a")
