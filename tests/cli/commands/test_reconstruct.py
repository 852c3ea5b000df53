"""``drorae reconstruct`` on photos and folders."""

import re

import numpy as np
import pytest
import torch
from PIL import Image

from model.images.similarity import psnr, ssim
from model.tokenizer import Tokenizer
from service.codecs.images import read_image
from service.photos.decode import ImageRules


@pytest.fixture
def reconstruct(run, checkpoint):
    return lambda *argv: run("reconstruct", "--checkpoint", checkpoint, *argv)


def expected(checkpoint, photo, latent="enriched", fit="crop"):
    """The reconstruction and its PSNR and SSIM, through the model's own methods."""
    tokenizer = Tokenizer.load(checkpoint)
    original = read_image(photo.read_bytes(), ImageRules(64, 10**8, 20, fit))[None].float() / 255
    picture = tokenizer.reconstruct(original, latent)
    return picture[0], psnr(picture, original).item(), ssim(picture, original).item()


def pixels(path) -> torch.Tensor:
    with Image.open(path) as picture:
        return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("options", "latent", "fit"),
    [([], "enriched", "crop"), (["--latent", "base"], "base", "crop"), (["--fit", "pad"], "enriched", "pad")],
)
def test_photo_to_picture_with_its_figures(reconstruct, checkpoint, photo, tmp_path, options, latent, fit):
    outcome = reconstruct(photo, tmp_path / "out.png", *options)
    picture, decibels, similarity = expected(checkpoint, photo, latent, fit)
    assert outcome.status == 0
    assert outcome.out == f"{photo}: PSNR {decibels:.2f} dB, SSIM {similarity:.4f}\n"
    assert outcome.err == ""
    assert torch.equal(pixels(tmp_path / "out.png"), picture.mul(255).round().to(torch.uint8))


@pytest.mark.parametrize(
    ("suffix", "kind"), [(".png", "PNG"), (".JPG", "JPEG"), (".jpeg", "JPEG"), (".webp", "WEBP")]
)
def test_the_suffix_chooses_the_format(reconstruct, photo, tmp_path, suffix, kind):
    output = tmp_path / f"out{suffix}"
    assert reconstruct(photo, output).status == 0
    with Image.open(output) as picture:
        assert (picture.format, picture.size) == (kind, (64, 64))


def test_photo_into_a_folder_keeps_its_name(reconstruct, photo, tmp_path):
    (tmp_path / "out").mkdir()
    assert reconstruct(photo, tmp_path / "out").status == 0
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["photo.png"]


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_folder_to_folder(reconstruct, photos, tmp_path, batch_size):
    outcome = reconstruct(photos, tmp_path / "out", "--batch-size", batch_size)
    assert outcome.status == 0
    written = sorted(str(file.relative_to(tmp_path / "out")) for file in (tmp_path / "out").rglob("*.*"))
    assert written == ["a.png", "b.png", "more/c.png"]
    *lines, mean = outcome.out.splitlines()
    decibels = [float(re.search(r"PSNR ([\d.]+) dB", line)[1]) for line in lines]
    assert len(decibels) == 3
    found = re.fullmatch(r"mean of 3 photos: PSNR ([\d.]+) dB, SSIM -?[\d.]+", mean)
    assert float(found[1]) == pytest.approx(sum(decibels) / 3, abs=0.011)


def test_photos_of_one_stem_do_not_overwrite_each_other(reconstruct, photos, tmp_path):
    (photos / "a.jpg").write_bytes((photos / "b.jpg").read_bytes())
    assert reconstruct(photos, tmp_path / "out").status == 0
    names = {file.name for file in (tmp_path / "out").rglob("*.png")}
    assert names == {"a.png.png", "a.jpg.png", "b.png", "c.png"}


def test_broken_photo_of_a_folder_is_skipped_and_counted(reconstruct, photos, broken_image, tmp_path):
    target = photos / broken_image.name
    target.write_bytes(broken_image.read_bytes())
    outcome = reconstruct(photos, tmp_path / "out")
    assert outcome.status == 3
    assert outcome.err.startswith(f"drorae: skipped {target}: ")
    assert outcome.err.count("\n") == 1
    assert "mean of 3 photos, 1 skipped" in outcome.out
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3


def test_output_inside_the_input_is_not_read_again(reconstruct, photos):
    for _ in range(2):
        assert "mean of 3 photos" in reconstruct(photos, photos / "out").out


def test_folder_of_nothing_but_broken_photos(run, checkpoint, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "x.jpg").write_bytes(b"no")
    outcome = run("reconstruct", folder, tmp_path / "out", "--checkpoint", checkpoint)
    assert outcome.status == 1
    assert "none of the 1 photos could be read" in outcome.err


def test_broken_photo_alone(refused, checkpoint, broken_image, tmp_path):
    message = refused("reconstruct", broken_image, tmp_path / "out.png", "--checkpoint", checkpoint)
    assert message.startswith(f"drorae: {broken_image}: ")
    assert not (tmp_path / "out.png").exists()


def test_usage_that_cannot_work(refused, photo, photos, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    cases = [
        (("missing.jpg", "out.png"), "missing.jpg: No such file"),
        ((photo, tmp_path / "out.txt"), "must end in one of .png, .jpg, .jpeg, .webp"),
        ((photo, photo), "would replace the input"),
        ((photos, tmp_path / "out.png"), "the output must be one too"),
        ((photos, photo), "the output must be one too"),
        ((photos, photos), "is the input folder"),
        ((empty, tmp_path / "out"), "no photos in this folder"),
    ]
    for arguments, expected_words in cases:
        assert expected_words in refused("reconstruct", *arguments)


def test_broken_checkpoint(refused, photo, tmp_path):
    message = refused("reconstruct", photo, tmp_path / "out.png", "--checkpoint", tmp_path / "no")
    assert f"no checkpoint directory at {tmp_path / 'no'}" in message


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_missing_device(refused, photo, checkpoint, tmp_path):
    argv = ("reconstruct", photo, tmp_path / "out.png", "--checkpoint", checkpoint, "--device", "cuda")
    assert "no GPU" in refused(*argv)
