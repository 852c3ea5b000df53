"""Evaluation, latent statistics, the linear probe and pictures, on a tiny tokenizer."""

import csv
import json
from pathlib import Path

import pytest
import torch

from model.metrics import psnr, ssim
from model.pictures import fit_picture
from model.pixels import to_tensor
from model.tokenizer import Tokenizer
from tests.training.conftest import TINY, TINY_FUSION, encode_png, make_image, write_shard
from training.data import decode_image
from training.errors import DataError
from training.evaluate import evaluate_command, evaluate_tokenizer
from training.pictures import reconstruction_grid, to_image
from training.probe import linear_probe
from training.statistics import latent_statistics


@pytest.fixture
def tokenizer() -> Tokenizer:
    torch.manual_seed(3)
    return Tokenizer(TINY.model_copy(update={"fusion": TINY_FUSION})).eval()


def fitted(photos: Path) -> torch.Tensor:
    files = sorted(photos.glob("*.png"))
    return torch.stack([to_tensor(fit_picture(decode_image(f.read_bytes()), 32)) for f in files])


def test_evaluation_is_the_mean_over_images(tokenizer: Tokenizer, photos: Path) -> None:
    report = evaluate_tokenizer(tokenizer, [photos], batch_size=5, num_pictures=3)
    images = fitted(photos)
    decoded = tokenizer.reconstruct(images)
    assert report.psnr_db == pytest.approx(psnr(decoded, images).mean().item(), abs=1e-4)
    assert report.ssim == pytest.approx(ssim(decoded, images).mean().item(), abs=1e-5)
    assert [row[0] for row in report.per_image] == [f"{index:02d}" for index in range(12)]
    assert report.originals.shape == report.reconstructions.shape == (3, 3, 32, 32)


def test_broken_images_are_counted_and_left_out(tokenizer: Tokenizer, photos: Path) -> None:
    (photos / "02.png").write_bytes(b"text")
    report = evaluate_tokenizer(tokenizer, [photos], batch_size=5)
    assert report.num_broken == 1
    assert len(report.per_image) == 11


def test_only_broken_images_is_an_error(tokenizer: Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"text")
    with pytest.raises(DataError, match="none of the 1 images"):
        evaluate_tokenizer(tokenizer, [tmp_path])


def test_command_writes_json_rows_and_a_grid(
    tokenizer: Tokenizer, photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    info = tokenizer.save(tmp_path / "checkpoint")
    assert evaluate_command(str(info.path), photos, tmp_path / "report", device="cpu") == 0
    summary = json.loads((tmp_path / "report" / "evaluation.json").read_text())
    assert summary == json.loads(capsys.readouterr().out)
    assert summary["checkpoint_sha256"] == info.sha256
    with (tmp_path / "report" / "images.csv").open() as stream:
        assert len(list(csv.DictReader(stream))) == summary["num_images"] == 12
    assert (tmp_path / "report" / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_statistics_equal_the_two_pass_result(tokenizer: Tokenizer, photos: Path) -> None:
    latents = tokenizer.encode(fitted(photos)).double()
    mean, var = latent_statistics(tokenizer, [photos])
    torch.testing.assert_close(mean.double(), latents.mean(dim=0), rtol=0, atol=1e-6)
    torch.testing.assert_close(var.double(), latents.var(dim=0, correction=0), rtol=0, atol=1e-6)
    tokenizer.set_statistics(mean, var)
    normalized = tokenizer.encode(fitted(photos), normalize=True)
    assert normalized.mean(dim=0).abs().max() < 1e-4


def test_probe_separates_what_is_separable(tokenizer: Tokenizer, tmp_path: Path) -> None:
    members: dict[str, bytes] = {}
    for index in range(40):
        label = index % 2
        image = make_image(index).point(lambda value, light=label: value // 3 + 160 * light)
        members |= {f"{index}.png": encode_png(image), f"{index}.cls": str(label).encode()}
    # five classes at least: the probe reports top-5
    for label in range(2, 5):
        members |= {f"x{label}.png": encode_png(make_image(label)), f"x{label}.cls": str(label).encode()}
    shard = write_shard(tmp_path / "a.tar", members)
    result = linear_probe(tokenizer, [shard], [shard], image_size=28)
    assert result.num_classes == 5
    assert result.top1 > 0.8
    assert result.top5 == 1.0


def test_probe_needs_labels(tokenizer: Tokenizer, photos: Path) -> None:
    with pytest.raises(DataError, match="needs a class"):
        linear_probe(tokenizer, [photos], [photos], image_size=28)


def test_grid_places_every_picture() -> None:
    rows = [torch.zeros(2, 3, 8, 8), torch.ones(2, 3, 8, 8)]
    grid = reconstruction_grid(rows, ["dark", "light"])
    assert grid.width == 2 * (8 + 4) + 4
    pixels = [to_image(row[0]).getpixel((0, 0)) for row in rows]
    assert pixels == [(0, 0, 0), (255, 255, 255)]
